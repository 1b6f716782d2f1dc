# `make demo` and `make test` each work alone on a fresh machine: both build .venv first when it is missing or stale.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Nothing here may reach for a model hub.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo blind settings ablation rewards test faults lint clean

$(STAMP): requirements.txt requirements-ray.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet -r requirements-ray.txt || echo "Ray cannot be installed here: its tests skip" >&2
	touch $@

demo: $(STAMP)
	$(PY) -m microworld.demo --out demo

# The demo, and beside it a captioner trained on captions dealt to wrong images.
blind: $(STAMP)
	$(PY) -m microworld.demo --out demo --blind

# All six settings on the demo's scenes, what each part of the recipe is worth, and what rewards add to the setting best;
# each goes on where it stopped.
settings ablation rewards: $(STAMP)
	$(PY) -m microworld.studies $@ --out demo

test: $(STAMP)
	$(PY) -m pytest

# Kills, full disks, vanishing files and damaged ones, by the hundred; `make test` has a small form of it.
faults: $(STAMP)
	$(PY) -m pytest tests/faults -m faults

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/shellcheck hw3_download.sh p2_train.sh bench/full_size.sh .ci/run

clean:
	rm -rf $(VENV) demo
