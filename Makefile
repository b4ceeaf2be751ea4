# Everything a contributor types. Each target makes its own .venv first; only Python 3.11+ and make are needed.
#
#   make demo       two edges train against a cloud in other processes; prints where the report is
#   make test       what must pass before a commit: format, lint, types, import arrows, tests
#   make test-slow  the tests that need the downloaded model or minutes of compute
#   make containers builds the image and runs both compose files with Docker or Podman

PYTHON ?= $(shell for p in python3.11 python3 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROTO  := proto/tightbeam/proto/backbone.proto

# Clouds and edges run side by side in the tests: one thread each is faster than all of them on every core.
export OMP_NUM_THREADS ?= 1
# Test processes side by side. What one of them has not begun, the other takes when it has nothing left.
WORKERS ?= 2

.PHONY: install demo test test-fast test-slow containers lint types imports format protos clean

install: $(VENV)/.dev

$(VENV)/.base: constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found. Install one, or: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch ..."
	@$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	@echo "installing tightbeam ..."
	@$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "installing tightbeam and the developer tools ..."
	@$(PIP) -e ".[demo,dev]"
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/tightbeam demo $(ARGS)

test: lint types imports test-fast

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow $(ARGS)

containers: $(VENV)/.demo
	@command -v docker >/dev/null && docker compose version >/dev/null 2>&1 || $(PIP) podman-compose==1.6.0
	@PYTHONPATH=deploy $(BIN)/python -m containers $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# tests/house/test_protos.py fails when the committed code differs from what this writes.
protos: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto \
	  --grpc_python_out=proto --mypy_out=proto --mypy_grpc_out=proto $(PROTO)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
