# `make try`, `make demo` and `make test` each work alone on a fresh machine: they make .venv first where it is missing or outdated.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.dev

# Nothing here may contact a model hub.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: try demo blind settings variants rewards letter test faults lint clean

# What the scripts need.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11 (now $(PYTHON): $$($(PYTHON) -V 2>&1))" >&2; \
	  exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

# What tests and linters need as well.
$(DEV): $(INSTALLED) requirements-dev.txt pyproject.toml
	$(PY) -m pip install --quiet -r requirements-dev.txt
	$(PY) -m pip install --quiet "$$(sed -n 's/^ray = \["\(.*\)"\].*/\1/p' pyproject.toml)" \
	  || echo "Ray cannot be installed here: its tests will be skipped" >&2
	@touch $@

# Captions and maps of drawings that no training showed, and of pictures: make try IMAGE="a.jpg b.png".
try: $(INSTALLED)
	$(PY) -m microworld.try_it $(IMAGE)

# Train, caption, score and explain on the micro world, and write the report.
demo: $(INSTALLED)
	$(PY) -m microworld.demo --out demo

# The demo, and a second captioner trained on captions of the wrong images: what language alone can score.
blind: $(INSTALLED)
	$(PY) -m microworld.demo --out demo --blind

# On scenes of their own: all settings; what each part of the recipe is worth; what rewards add; what each point of the
# report's code is worth. Each resumes where it was stopped.
settings variants rewards letter: $(INSTALLED)
	$(PY) -m microworld.studies $@ --out demo

# Two processes of one thread each: tests may run side by side and in any order.
test: $(DEV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# Hundreds of kills, full disks, vanishing and damaged files; `make test` has a small form of it.
faults: $(DEV)
	$(PY) -m pytest tests/faults -m faults

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/shellcheck hw3_download.sh p2_train.sh bench/full_size.sh .ci/run

clean:
	rm -rf $(VENV) demo build *.egg-info
