#!/usr/bin/env bash
# The best full-size run: GPT-2 small + CLIP ViT-L/14 with LoRA, on what `bash hw3_download.sh` made.
# Flags are passed on: bash p2_train.sh --epochs 4, or bash p2_train.sh --setting 1 (which goes to runs/1).
# It may be called from any folder: paths in flags, and runs/, are in that folder.
# On several GPUs it starts a process for each; CUDA_VISIBLE_DEVICES=0 or a --device limits it to one, which trains
# about as fast at 16 images a batch: parts of a batch launch as many kernels as the whole.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  [[ ! -x $here/.venv/bin/python ]] || PYTHON=$here/.venv/bin/python
fi

gpus=1
if [[ " $* " != *" --device"[\ =]* ]] && command -v nvidia-smi >/dev/null; then
  # torch knows which of them this process may use, but takes seconds: it is asked only where there are several.
  # It fails where the driver does; parts of a GPU (MIG) are listed below it, indented.
  listed=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
  if ((listed > 1)); then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  fi
fi
if ((gpus > 1)); then
  # As a module: the accelerate command imports timm, which dies where torchvision's operators are missing.
  exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$gpus" \
    --mixed_precision no --dynamo_backend no --main_process_port 0 "$here/p2_train.py" "$@"
fi
exec "$PYTHON" "$here/p2_train.py" "$@"
