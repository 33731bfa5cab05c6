# One command per chore. Everything lives in .venv, and for lmdeploy in .venv-lmdeploy; nothing outside this folder is
# changed but the model cache, and by system-deps the system.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
LMDEPLOY_VENV := .venv-lmdeploy
LMDEPLOY := $(LMDEPLOY_VENV)/bin/python
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
SYSTEM_DEPS := redis-server:redis-server chromium:chromium ip:iproute2 wrk:wrk
BENCHMARKS := routing scale token_plane makespan pool_efficiency http_client triton_client endurance failover serving batch

.PHONY: help demo serve system-deps test test-lmdeploy test-lmdeploy-regression test-gpu lint format bench clean

help:
	@echo "make demo    answer a batch and three chats with a small model on this machine's CPU"
	@echo "make serve   the same model over HTTP, at http://127.0.0.1:8000, until Ctrl-C"
	@echo "make system-deps  install what tests and benchmarks run beside raylm, on Debian and Ubuntu"
	@echo "make test    run all tests"
	@echo "make test-lmdeploy  run the tests of the lmdeploy engines on CPU (installs 8 GB)"
	@echo "make test-lmdeploy-regression  compare lmdeploy on CPU with transformers"
	@echo "make test-gpu  run them, and their benchmark, where a GPU is"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff format"
	@echo "make bench   measure the README's figures but lmdeploy's (about half an hour; after make system-deps)"
	@echo "make clean   remove the virtual environment"

demo: $(VENV)/.runs
	$(BIN)/raylm demo

serve: $(VENV)/.runs
	$(BIN)/raylm serve

# Each is PROGRAM:PACKAGE; a package is installed where its program is missing.
system-deps:
	@missing=; PATH="$$PATH:/usr/sbin:/sbin"; \
	for dep in $(SYSTEM_DEPS); do \
		command -v $${dep%%:*} >/dev/null || missing="$$missing $${dep##*:}"; \
	done; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get -o DPkg::Lock::Timeout=300 update && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive \
			apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $$missing; \
	fi

# Two at a time, a file each: most tests wait for processes.
test: $(VENV)/.develops
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-lmdeploy: $(LMDEPLOY_VENV)/.develops
	$(LMDEPLOY) -m raylm.engines.gguf smollm2-135m-instruct
	$(LMDEPLOY) -m pytest tests/lmdeploy tests/test_compat.py

test-lmdeploy-regression: $(LMDEPLOY_VENV)/.develops
	$(LMDEPLOY) -m pytest tests/lmdeploy/regression.py

test-gpu: $(LMDEPLOY_VENV)/.develops
	@if $(LMDEPLOY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(LMDEPLOY) -m pytest tests/lmdeploy/gpu.py && $(LMDEPLOY) benchmarks/lmdeploy_efficiency.py; \
	else echo "torch sees no GPU on this machine: nothing was tested"; fi

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
	rm -rf $(VENV) $(LMDEPLOY_VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raylm needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	@touch $@

$(VENV)/.develops: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,data,redis,eval,dev]'
	@touch $@

$(LMDEPLOY):
	$(PYTHON) -m venv $(LMDEPLOY_VENV)

$(LMDEPLOY_VENV)/.develops: $(LMDEPLOY) pyproject.toml constraints.txt constraints-lmdeploy.txt
	$(LMDEPLOY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-lmdeploy.txt \
		-e '.[lmdeploy,eval,dev]'
	@touch $@
