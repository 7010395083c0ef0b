#!/usr/bin/env bash
# bash scripts/benchmark/wheels.sh FOLDER [PYTHON]: wheels of what gpu_check.sh needs beside torch, torchvision, timm and accelerate.
# Run it with a network, on the system and Python version of the machine without one; about 9 MB.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash scripts/benchmark/wheels.sh FOLDER [PYTHON]" >&2
    exit 2
fi
folder=$1
python=${2:-python3}
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" \
    hydra-core 'omegaconf<2.4' antlr4-python3-runtime==4.9.3 diffusers torch-fidelity importlib_metadata zipp
"$python" -m pip wheel --quiet --wheel-dir "$folder" pydantic # with pydantic-core of the one version that it takes
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1)"
echo "there: python3 -m pip install --no-index --no-deps --target SITE $folder/*.whl; PYTHONPATH=SITE bash scripts/gpu_check.sh OUT"
