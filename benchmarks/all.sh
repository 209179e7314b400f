#!/usr/bin/env bash
# Prints every number that docs/measurements.md states: against published GPU figures (each under the transformers
# release that it was measured with), against the real training stack on this machine's CPU, and the waiting times.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

echo "## Published figures, transformers of this environment"
"$python" benchmarks/accuracy.py
echo
echo "## Published figures, transformers 4.48.1"
PYTHONPATH=$(bash benchmarks/make_environment.sh 4.48.1) "$python" benchmarks/accuracy.py
echo
echo "## Published speeds"
"$python" benchmarks/throughput.py
echo
echo "## The real training stack on two CPU ranks"
"$python" benchmarks/real_stack.py
echo
echo "## Waiting times"
"$python" benchmarks/speed.py --profile
echo
echo "## The search"
PYTHONPATH=$(bash benchmarks/make_peers.sh) "$python" benchmarks/search.py --processes
