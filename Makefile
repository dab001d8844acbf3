# `make demo` and `make test` need git, make and Python 3.11 or newer; the rest they bring themselves, into .venv.
# Another Python: make PYTHON=/path/to/python3.12 test. Package indexes and proxies are those your pip and uv use.

BIN := .venv/bin
# Test processes at a time, of about 2 GB each.
JOBS ?= 2
export PYTHON
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-long lint format lock bench clean

help:
	@echo 'make demo       the main job on a small picture set, under two minutes after the install'
	@echo 'make test       linters, types and the tests'
	@echo 'make test-long  the same, with the tests that take long'
	@echo 'make lint       linters and types alone         make format  lay the code out'
	@echo 'make bench      start-up time                   make lock    compile the two locks anew'
	@echo 'make clean      remove .venv and what the tools left'

.venv/.ready: requirements.lock pyproject.toml scripts/setup scripts/python
	@scripts/setup

.venv-peers/.ready: .venv/.ready requirements-peers.lock scripts/setup-peers
	@scripts/setup-peers

demo: .venv/.ready
	$(BIN)/mmdata demo

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint .venv-peers/.ready
	@scripts/debian-packages
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-long: lint .venv-peers/.ready
	@scripts/debian-packages
	$(BIN)/pytest -m 'long or not long' --timeout 7200 -n $(JOBS) --dist loadfile $(ARGS)

bench: .venv/.ready
	$(BIN)/python tests/bench/startup.py

lock: .venv/.ready
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --no-header --group dev --extra all $(ARGS) --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --no-header --group peers --extra mds $(ARGS) --output-file requirements-peers.lock \
	  pyproject.toml

clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist demo-out
