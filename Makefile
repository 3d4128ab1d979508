# What a person types. `make` or `make help` lists the targets; CI runs the same ones.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-oldest check bench gpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## Create .venv and install the locked packages into it

# uv comes from the lock too: pip installs it, and it installs the rest in seconds where a cache is warm.
.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"MaskLake needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo "Installing MaskLake and its locked packages into .venv (a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## Train, label 500 images, score and query them: about seven minutes on two cores
	@$(BIN)/masklake demo

test: setup ## Run the test suite: under 15 minutes on two idle cores
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not faults" -rs

test-faults: setup ## Run what is too long for every change: random kills, lost nodes, variants of whole runs
	@$(BIN)/python -m pytest -m faults -rs

test-oldest: setup ## Run the quick tests on the oldest versions that pyproject.toml allows, in .venv-oldest
	@$(PYTHON) -m venv .venv-oldest
	@$(BIN)/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[dev]' 'setuptools>=77'
	@.venv-oldest/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow and not faults" -rs

check: setup ## Lint, format check and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## Run the benchmarks; each adds a row to benchmarks/results and a report
	@$(BIN)/python -m benchmarks.rle
	@$(BIN)/python -m benchmarks.kernels
	@$(BIN)/python -m benchmarks.label

gpu: setup ## Check and measure the GPU of this machine in under six minutes
	@$(BIN)/python -m benchmarks.gpu

clean: ## Remove the environment and everything the commands wrote
	rm -rf .venv .venv-oldest out build dist *.egg-info
