# Two commands: `make demo` and `make test`. Both set everything up on first use.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu lint format lock tables clean

demo: $(STAMP)
	$(BIN)/edgestill run configs/digits.yaml

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tables: $(STAMP)
	$(BIN)/python -m benchmarks.tables README.md docs/*.md

# uv is taken from the PATH, or installed with pip into a small environment of its own.
$(STAMP): requirements.txt pyproject.toml
	@set -e; \
	uv=$$(command -v uv || true); \
	if [ -z "$$uv" ]; then \
	  echo "installing uv ..."; \
	  $(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'; \
	  uv=.uv/bin/uv; \
	fi; \
	echo "installing edgestill and its locked requirements (about a minute, 5 GB on disk) ..."; \
	test -x $(BIN)/python || $$uv venv --quiet --python $(PYTHON) $(VENV); \
	$$uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt; \
	$$uv pip install --quiet --no-deps --python $(BIN)/python --editable .
	@touch $@

# Pins without index addresses or hashes. The index is whatever uv is configured with.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
	  --extra distill --extra ort-gpu --extra trt-rtx --extra demo --group dev pyproject.toml -o requirements.txt

clean:
	rm -rf $(VENV) .uv runs
