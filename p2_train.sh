#!/usr/bin/env bash
# The best full-size run: GPT-2 small + CLIP ViT-L/14 with LoRA, on what `bash hw3_download.sh` made.
# Flags are handed on: bash p2_train.sh --epochs 4, or bash p2_train.sh --setting 1 (which goes to runs/1).
set -euo pipefail
cd "$(dirname "$0")"
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
exec "$PYTHON" p2_train.py "$@"
