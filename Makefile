# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
KERNELS := iolite/kernels/cpu

.PHONY: help run test test-fast kernels lint format docs clean

help:
	@echo "make run        install iolite into .venv and let the embedded model look and listen"
	@echo "make test       lint, types and the whole test suite"
	@echo "make test-fast  the test suite without its slow part"
	@echo "make kernels    compile the C++ kernels that changed"
	@echo "make test-peers  builds llama.cpp (ten minutes, once) and compares with it"
	@echo "make lint       ruff and mypy;  make format: let ruff format"
	@echo "make docs       write docs/reference from the commands' help and the docstrings"

run: .venv/.iolite
	$(BIN)/iolite run nano "What number is this?" --image docs/demo/number.png
	$(BIN)/iolite run nano "What colour is the shape?" --image docs/demo/shape.png
	$(BIN)/iolite transcribe docs/demo/digits.wav

test: lint kernels
	$(BIN)/python -m pytest

test-fast: .venv/.dev kernels
	$(BIN)/python -m pytest -m "not slow"

# IOLITE_LLAMA_CPP=/path/to/llama.cpp also runs the tests of its converter, which the Python package lacks, and
# IOLITE_LLAMA_BIN=/path/to/build/bin those of its server's drafting.
test-peers: .venv/.peers
	$(BIN)/python -m pytest -m peer

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installing compiles them too; this is for afterwards. Without a compiler the tests of the reference still run.
kernels: .venv/.dev
	-$(BIN)/python $(KERNELS)/build.py

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.dev
	$(BIN)/python docs/reference/generate.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.iolite: .venv/bin/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ .venv/.iolite

.venv/.peers: .venv/.dev
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev,peers]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info $(KERNELS)/build $(KERNELS)/libiolite.*
