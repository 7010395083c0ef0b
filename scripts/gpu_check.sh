#!/usr/bin/env bash
# bash scripts/gpu_check.sh OUT [minutes=9] [checks=[…]] [key=value …]: does all of this work on this machine's GPU, and how fast?
# Needs no network, installs nothing, writes under OUT alone. What does not fit into the minutes is done by a second call.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# -eq 0 ] || [[ $1 == *=* ]]; then
    echo "usage: bash scripts/gpu_check.sh OUT [minutes=9] [checks=[…]] [key=value …]" >&2
    exit 2
fi
out=$1
shift
python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=python3
fi
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled
"$python" "$root/scripts/benchmark/packages.py"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m scripts.benchmark.gpu_check "out=$out" "$@"
