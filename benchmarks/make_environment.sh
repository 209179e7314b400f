#!/usr/bin/env bash
# Makes a folder with an older transformers (and what it insists on) to put on PYTHONPATH: a figure that was measured
# with one release is compared with a trace of that release.
#
#   bash benchmarks/make_environment.sh 4.48.1 [FOLDER]     prints the folder; made before, it is used again
#
# torch and bitsandbytes stay those of the environment that runs the benchmark. PYTHON names its interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

release=${1:-}
case "$release" in
  4.45.2) packages=(transformers==4.45.2 'tokenizers==0.20.*' 'huggingface_hub==0.25.*' peft==0.12.0 accelerate==0.34.2) ;;
  4.48.1) packages=(transformers==4.48.1 'tokenizers==0.21.*' 'huggingface_hub==0.27.*' peft==0.13.2 accelerate==1.0.1) ;;
  *) echo "make_environment.sh: unknown release '$release'; known: 4.45.2, 4.48.1" >&2; exit 2 ;;
esac
folder=${2:-.envs/transformers-$release}
python=${PYTHON:-.venv/bin/python}

if [ ! -d "$folder/transformers-$release.dist-info" ]; then
  mkdir -p "$(dirname "$folder")"
  beside=$(mktemp -d "$(dirname "$folder")/.making-XXXXXX")
  trap 'rm -rf "$beside"' EXIT
  "$python" -m pip --disable-pip-version-check --quiet install --no-deps --target "$beside" "${packages[@]}" >&2
  chmod 755 "$beside"
  # Another run may have made it meanwhile; then that one stays.
  mv -T "$beside" "$folder" 2>/dev/null || [ -d "$folder/transformers-$release.dist-info" ]
fi
(cd "$folder" && pwd)
