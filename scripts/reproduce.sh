#!/usr/bin/env bash
# bash scripts/reproduce.sh xl_256|xl_512 REFERENCE_NPZ [key=value …]: from a published checkpoint to its numbers.
# Converts it, samples 50 images of each class, evaluates them against ADM's reference npz and compares with the paper.
# The same command resumes. Keys: of sample.py, released and encoder_depth (of convert_checkpoint.py), inception_weights
# and pr_dtype (of evaluate.py).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    echo "usage: bash scripts/reproduce.sh xl_256|xl_512 REFERENCE_NPZ [key=value …]" >&2
    exit 2
}

case ${1:-} in
    xl_256) resolution=256 published='{fid:1.26,inception_score:310.6,precision:0.79,recall:0.65}' ;;
    xl_512) resolution=512 published='{fid:1.28,inception_score:305.1,precision:0.80,recall:0.63}' ;;
    *) usage ;;
esac
[ $# -ge 2 ] && [[ $2 != *=* ]] || usage
reference=$2
if [ ! -e "$reference" ]; then
    echo "REFERENCE_NPZ=$reference: no such file; give ADM's reference npz of ImageNet at $resolution px" >&2
    exit 1
fi

released=MCG-NJU/DDT-XL-22en6de-R$resolution encoder_depth=22
ckpt=checkpoints/published_$1 out=samples/published_$1
sampling=() evaluation=()
for setting in "${@:3}"; do
    case $setting in
        released=*) released=${setting#*=} ;;
        encoder_depth=*) encoder_depth=${setting#*=} ;;
        ckpt=*) ckpt=${setting#*=} ;;
        out=*) out=${setting#*=} ;;
        inception_weights=* | pr_dtype=*) evaluation+=("$setting") ;;
        num_processes=*) sampling+=("$setting") evaluation+=("$setting") ;;
        *=*) sampling+=("$setting") ;;
        *) usage ;;
    esac
done

python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=python3
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ ! -e "$ckpt/manifest.json" ]; then
    "$python" "$root/scripts/convert_checkpoint.py" "released=$released" "encoder_depth=$encoder_depth" \
        "resolution=$resolution" "out=$ckpt"
fi
"$python" "$root/sample.py" "experiment=published_$1" "ckpt=$ckpt" "out=$out" ${sampling[@]+"${sampling[@]}"}
"$python" "$root/evaluate.py" "samples=$out" "reference=$reference" features=inception \
    ${evaluation[@]+"${evaluation[@]}"}
"$python" "$root/scripts/compare_metrics.py" "metrics=[\"$out\"]" "published=$published"
