#!/usr/bin/env bash
# The whole job at full size with random weights and generated photographs, nothing downloaded: bench/full_size.py.
# Flags are handed on: bash bench/full_size.sh --out rehearsal, or bash bench/full_size.sh --tiny for a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m bench.full_size "$@"
