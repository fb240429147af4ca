#!/usr/bin/env bash
# All that needs a GPU, in four parts of less than ten minutes each; without a part, all of them (about half an hour).
#
#   benchmarks/gpu.sh DATA OUT [tests|step|first|second]
#
# DATA is CIFAR-10, in any form that pfgm.data.ImageDataModule takes, OUT the folder for what is measured:
#   tests   the marked tests                                           -> tests.txt
#   step    whole step over bare step at CIFAR-10 size, in bfloat16, compiled, and in float32, uncompiled, the way the
#           research code runs: images per second, peak memory         -> step.md
#   first   eight minutes of training at full width                    -> run/, with sample grids
#   second  eight minutes more of the same run, resumed, and samples   -> run/, samples.png
set -euo pipefail
data=${1:?give CIFAR-10, such as torchvision:CIFAR10} out=${2:?give a folder for the results}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
"$python" -c "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__)" | tee "$out/machine.txt"

tests() { "$python" -m pytest -q -m gpu | tee "$out/tests.txt"; }

step() {
    "$python" benchmarks/train_step.py --size cifar10 --batch 512 --precision bf16-mixed --compile --channels_last --plain \
        --pairs 5 --group 10 | tee "$out/step.md"
}

fit() {  # for so many minutes in all; warm-up and average fit the short run
    "$python" train.py fit --config configs/cifar10_pfgmpp.yaml --data.path "$data" --data.held_out 0.02 --run_dir "$out/run" \
        --trainer.max_time "00:00:$1:00" --model.warmup_steps 500 --ema.warmup 0.1 --trainer.val_check_interval 500 \
        --checkpoint.every_n_steps 500 --grid.n 64
}

first() { fit 08; }

second() {
    fit 16
    "$python" sample.py "$out/run/checkpoints/last.ckpt" --n 64 --out "$out/samples.png"
}

if [ $# -gt 2 ]; then "$3"; else tests && step && first && second; fi
