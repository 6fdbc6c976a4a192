# make demo    .venv, pinned install, then the main job on embedded models; ends with a report
# make test    .venv, pinned install, then formatter, linter, type checker and all tests
#
# PYTHON       interpreter for the environment, 3.11 or newer
# TORCH_INDEX  index with PyTorch's CPU wheels, asked only where pip's own configuration does not find them
# TESTS        what `make test` runs, e.g. make test TESTS=tests/unit
PYTHON      ?= python3.11
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TESTS       ?= tests
BIN         := .venv/bin
TORCH       := $(shell grep '^torch==' requirements-cpu.txt)

.PHONY: install demo test lint lock

install: .venv/installed

.venv/installed: requirements-cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps "$(TORCH)" || $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/pip install --quiet --no-deps -r requirements-cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/rc-ray doctor
	touch $@

demo: install
	$(BIN)/rc-ray run embedded:demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest $(TESTS)

lock: install
	{ sed -n '/^#/p' requirements-cpu.txt; $(BIN)/pip freeze --all --exclude-editable | grep -v -i -E '^(pip|wheel|rc.ray)(==| @)'; } > requirements-cpu.new
	mv requirements-cpu.new requirements-cpu.txt
