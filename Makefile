# One command per chore. Everything lives in .venv; nothing outside this folder is changed but the model cache.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := routing token_plane makespan pool_efficiency

.PHONY: help demo test lint format bench clean

help:
	@echo "make demo    answer a batch and three chats with a small model on this machine's CPU"
	@echo "make test    run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff format"
	@echo "make bench   measure every figure of the README (about ten minutes)"
	@echo "make clean   remove the virtual environment"

demo: $(VENV)/.runs
	$(BIN)/raylm demo

test: $(VENV)/.develops
	$(BIN)/python -m pytest

lint: $(VENV)/.develops
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.develops
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.develops
	@for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raylm needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	@touch $@

$(VENV)/.develops: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@touch $@
