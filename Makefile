# make demo   install into .venv and generate text from the embedded model
# make test   the same, plus test dependencies, then the tests
# make lint   formatters, linters and type checks
# make clients  official clients of other APIs, each in its own environment, against a live server
# make bench  the kernel benchmark: ceilings first, then every format

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.test-dependencies
LINTED := $(VENV)/.lint-dependencies
SOURCES := pyproject.toml CMakeLists.txt $(shell find src csrc -type f -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: demo test lint format bench native clients clean

demo: $(INSTALLED)
	$(BIN)/greenroom demo

# Two processes: as many as have room in 24 GiB.
test: $(TESTED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(LINTED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp')

format: $(LINTED)
	$(BIN)/ruff check --fix-only -q
	$(BIN)/ruff format -q
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp')

bench: $(INSTALLED)
	$(BIN)/greenroom bench-kernels

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: a build of it that is already chosen is then kept.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q '.[server,plots,gpu]'
	@touch $@

$(TESTED): $(INSTALLED)
	$(BIN)/python tools/extras.py test > $(VENV)/test.txt
	$(BIN)/pip install -q -r $(VENV)/test.txt
	@touch $@

$(LINTED): $(TESTED)
	$(BIN)/python tools/extras.py lint > $(VENV)/lint.txt
	$(BIN)/pip install -q -r $(VENV)/lint.txt
	@touch $@

clients: $(INSTALLED)
	$(BIN)/python tools/extras.py server > $(VENV)/server.txt
	$(BIN)/pip install -q -r $(VENV)/server.txt
	$(BIN)/python tests/needs/clients/run.py

# For development: the extensions beside the Python sources (PYTHONPATH=src).
native:
	cmake -S . -B build/inplace -G Ninja -DGREENROOM_INPLACE=ON -DPython_EXECUTABLE=$(shell which $(PYTHON))
	cmake --build build/inplace

clean:
	rm -rf build $(VENV) src/greenroom/*.so
