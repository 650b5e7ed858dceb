# make demo    score -> filter -> report on the sample data
# make test    the test suite
# make check   format, lint, types, tests: what CI runs
# All of them make their own environment in .venv first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/.ready

demo: .venv/.ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" sample_data/demo.sh

test: .venv/.ready
	$(BIN)/python -m pytest

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
