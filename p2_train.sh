#!/usr/bin/env bash
# The best full-size run: GPT-2 small + CLIP ViT-L/14 with LoRA. Flags are handed on: bash p2_train.sh --epochs 4
set -euo pipefail
cd "$(dirname "$0")"
exec "${PYTHON:-python}" p2_train.py --setting best --out runs/best "$@"
