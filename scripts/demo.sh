#!/usr/bin/env bash
# From nothing to samples: sets up .venv, trains a DDT on handwritten digits (about a minute on two CPU cores), samples,
# evaluates. Run it again and it resumes, or says that all is done.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run=runs/demo
$python train.py name=demo
$python sample.py ckpt=$run num_samples=1000 batch_size=250 out=$run/samples
$python evaluate.py samples=$run/samples reference=data:digits features=digits
echo
echo "sample grid: $PWD/$run/samples/grid.png"
echo "metrics:     $PWD/$run/samples/metrics.json"
