# make quickstart | test | reliability | docs | lint: each makes its environment in .venv, once.
# Needs Python 3.11, make and pip.

PYTHON ?= python3.11
JOBS   ?= 2
TESTS  ?= tests
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet

# Before anything that needs torch, so that no other build is chosen on its behalf.
TORCH  ?= torch==2.13.0

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart test reliability docs lint clean

help:
	@echo "make quickstart   train a small model with DPO and show before and after"
	@echo "make test         all tests (TESTS=tests/cli for some, JOBS=8 for more processes)"
	@echo "make reliability  the long form of what must survive, ending with its figures (hours; JOBS=8 for more processes)"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make lint         ruff and pyright"
	@echo "make clean        remove the environment"

quickstart: .venv/.base
	OMP_NUM_THREADS=2 $(BIN)/prefopt quickstart

test: .venv/.test
	$(BIN)/pytest $(TESTS) -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 10
ifeq ($(TESTS),tests)
	$(BIN)/pytest --doctest-modules --doctest-ignore-import-errors --doctest-glob '*.md' src docs $(wildcard README.md) -n $(JOBS) --dist loadfile
endif

reliability: .venv/.test
	RELIABILITY=long $(BIN)/pytest tests/reliability tests/parity/test_loss_curve.py \
	    -n $(JOBS) --dist loadfile --no-loadscope-reorder

docs: .venv/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv

.venv/.python:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	touch $@

.venv/.base: .venv/.python pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/.test: .venv/.base
	$(PIP) --editable '.[peft,test,docs]'
	touch $@

.venv/.lint: .venv/.base
	$(PIP) --editable '.[peft,lint]'
	touch $@
