#!/usr/bin/env bash
# bash scripts/reproduce.sh MODEL REFERENCE_NPZ [key=value …]: from a published checkpoint to its numbers.
# MODEL: xl_256, xl_512 (DDT), ditdh_xl_256, ditdh_xl_512 (DiT^DH with its guide; 256 px also without guidance: guide=null).
# Converts it, samples 50 images of each class, evaluates them against ADM's reference npz and compares with the paper.
# The same command resumes. Keys: of sample.py; released, released_guide and encoder_depth, for convert_checkpoint.py;
# inception_weights and pr_dtype, of evaluate.py.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    echo "usage: bash scripts/reproduce.sh xl_256|xl_512|ditdh_xl_256|ditdh_xl_512 REFERENCE_NPZ [key=value …]" >&2
    exit 2
}

model=${1:-}
resolution=${model##*_}
conversion=() guide=null released_guide=''
case $model in
    xl_256) published='{fid:1.26,inception_score:310.6,precision:0.79,recall:0.65}' ;;
    xl_512) published='{fid:1.28,inception_score:305.1,precision:0.80,recall:0.63}' ;;
    ditdh_xl_256 | ditdh_xl_512) published='{fid:1.13}' ;;
    *) usage ;;
esac
if [[ $model == ditdh_* ]]; then # whose files say depth and resolution
    released=ditdh-xl-$resolution released_guide=ditdh-s-$resolution
    guide=checkpoints/published_ditdh_s_$resolution
else
    released=MCG-NJU/DDT-XL-22en6de-R$resolution conversion=(encoder_depth=22 "resolution=$resolution")
fi
[ $# -ge 2 ] && [[ $2 != *=* ]] || usage
reference=$2
if [ ! -e "$reference" ]; then
    echo "REFERENCE_NPZ=$reference: no such file; give ADM's reference npz of ImageNet at $resolution px" >&2
    exit 1
fi

ckpt=checkpoints/published_$model out=samples/published_$model
sampling=() evaluation=()
for setting in "${@:3}"; do
    case $setting in
        released=*) released=${setting#*=} ;;
        released_guide=*) released_guide=${setting#*=} ;;
        guide=*) guide=${setting#*=} ;;
        encoder_depth=*) conversion=("$setting" "resolution=$resolution") ;;
        ckpt=*) ckpt=${setting#*=} ;;
        out=*) out=${setting#*=} ;;
        inception_weights=* | pr_dtype=*) evaluation+=("$setting") ;;
        num_processes=*) sampling+=("$setting") evaluation+=("$setting") ;;
        *=*) sampling+=("$setting") ;;
        *) usage ;;
    esac
done
if [[ $model == ditdh_* && $guide == null ]]; then # cfg_scale of the preset is the guide's
    if [ "$model" != ditdh_xl_256 ]; then
        echo "guide=null: no number of $model without its guide was published; leave it out, or use ditdh_xl_256" >&2
        exit 1
    fi
    published='{fid:1.51}'
    for setting in ${sampling[@]+"${sampling[@]}"}; do
        if [[ $setting == cfg_scale=* && ! $setting =~ ^cfg_scale=1(\.0*)?$ ]]; then
            echo "$setting: the published FID without a guide, 1.51, is of cfg_scale=1; leave it out" >&2
            exit 1
        fi
    done
    sampling+=(cfg_scale=1)
fi

python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=python3
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

convert() { # RELEASED OUT [key=value …]
    if [ ! -e "$2/manifest.json" ]; then
        "$python" "$root/scripts/convert_checkpoint.py" "released=$1" "${@:3}" "out=$2"
    fi
}

convert "$released" "$ckpt" ${conversion[@]+"${conversion[@]}"}
if [[ $guide != null && -n $released_guide ]]; then
    convert "$released_guide" "$guide"
fi
"$python" "$root/sample.py" "experiment=published_$model" "ckpt=$ckpt" "guide=$guide" "out=$out" \
    ${sampling[@]+"${sampling[@]}"}
"$python" "$root/evaluate.py" "samples=$out" "reference=$reference" features=inception \
    ${evaluation[@]+"${evaluation[@]}"}
"$python" "$root/scripts/compare_metrics.py" "metrics=[\"$out\"]" "published=$published"
