#!/usr/bin/env bash
# Makes a folder with the estimators that accuracy.py compares autofit with, from PyPI, to put on PYTHONPATH.
#
#   PYTHONPATH=$(bash benchmarks/make_peers.sh) python benchmarks/accuracy.py --peers
#
# Without their dependencies: only their formulas are called. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(fitcheck-llm==0.3.1 ftuneai==0.4.1 hf-vram-calc==1.0.9)
folder=${1:-.envs/peers}
python=${PYTHON:-.venv/bin/python}

if [ ! -d "$folder/hf_vram_calc-1.0.9.dist-info" ]; then
  mkdir -p "$folder"
  "$python" -m pip --disable-pip-version-check --quiet install --no-deps --upgrade --target "$folder" "${packages[@]}" >&2
fi
(cd "$folder" && pwd)
