# `make help` lists the targets. Everything happens inside .venv; nothing is installed elsewhere.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
# Tests that kill real processes depend on who runs first; one that fails is given two more tries, and pytest says so.
RERUNS ?= 2
# Many tests wait for servers, agents and disks, so more workers than cores still pay.
WORKERS ?= 3

.PHONY: help setup demo test lint format types arch test-crash test-deep bench docs ci clean

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with everything the demo and the tests need

$(STAMP): pyproject.toml constraints.txt hatch_build.py src/ckptstore/native/kernels.c src/ckptstore/native/build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "the venv module is missing; run: apt-get install python3-venv"; exit 1; }
	@free=$$(df -Pk . | awk 'NR==2 {print int($$4/1048576)}'); [ "$$free" -ge 4 ] || { echo "4 GiB of free disk are needed here, $$free GiB are left; make room first"; exit 1; }
	@[ -x $(BIN)/python ] || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (torch is the large one)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train, kill -9, wipe the disk, restore from S3, go on with the same losses
	@$(BIN)/python -m ckptstore.demo

test: $(STAMP)  ## the test suite
	$(PYTEST) -n $(WORKERS) --dist loadfile --max-worker-restart 0 --reruns $(RERUNS)

test-crash: $(STAMP)  ## the long crash sweeps: kill -9 and power cuts at many more moments
	CKPTSTORE_TEST_SCALE=10 $(PYTEST) tests/crash -m crash

test-deep: $(STAMP)  ## property tests with many more examples, and the soak of 2 000 saves
	CKPTSTORE_TEST_SCALE=50 $(PYTEST) tests/unit tests/fidelity --timeout 9000

lint: $(STAMP)  ## ruff: style and mistakes
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

format: $(STAMP)  ## let ruff format and fix what it can
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

arch: $(STAMP)  ## import-linter: imports point down only
	$(BIN)/lint-imports

bench: $(STAMP)  ## measure against the peers; JSON goes to benchmarks/results
	$(BIN)/python benchmarks/save.py

docs: $(STAMP)  ## run every code block of README and docs
	$(PYTEST) tests/docs

ci: lint types arch test  ## what CI runs

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .demo
