# `make` lists the targets. PYTHON makes the virtual environment VENV. VENV=none uses PYTHON's own
# environment as it is: nothing is installed, no network is needed, and only what changed is compiled
# (so `make build VENV=none PYTHON=.venv/bin/python` is the quick way while editing csrc).

PYTHON ?= python3
VENV ?= .venv

BUILT := build/.built

ifeq ($(VENV),none)
RUN := $(PYTHON)
CLANG_FORMAT := clang-format
BUILD := $(RUN) setup.py --quiet build_ext --inplace
else
RUN := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
TOOLS := $(VENV)/.tools
BUILD := $(RUN) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[test,bench]'
# Without their dependencies: each asks for torch, and pip would bring another build of it.
LIBRARIES := $(RUN) -m pip install --quiet --no-deps -c constraints.txt -r tests/requirements.txt
endif

.PHONY: help build test test-install bench paper gpu-check lint clean

help:
	@echo 'make build       compile the extension (without a compiler: set up the package without it)'
	@echo 'make test        run the tests and the examples in the docstrings'
	@echo 'make test-install  build wheels and sdist, install them elsewhere, check their types'
	@echo 'make bench       run the quick benchmarks'
	@echo 'make paper       run the experiments of the paper, in their quick form'
	@echo 'make gpu-check   build into the environment of PYTHON, check all that needs a GPU'
	@echo 'make lint        check style, types and formatting'
	@echo 'make clean       remove what was built, but not $(VENV)'

build: $(BUILT)

test: $(BUILT)
	$(RUN) -m pytest

test-install: $(BUILT)
	$(RUN) -m pytest -m install

bench: $(BUILT)
	$(RUN) -m benchmarks --preset quick

paper: $(BUILT)
	$(RUN) -m benchmarks.paper claim all --preset quick

gpu-check:
	$(PYTHON) .ci/gpu_check.py

lint: $(TOOLS)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror \
		$$(find csrc tests/cuda_emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

# Folders are listed by find too: a deleted source is a change.
$(BUILT): $(TOOLS) pyproject.toml setup.py tests/requirements.txt $(shell find csrc build_tools/*.py)
	$(LIBRARIES)
	$(BUILD)
	mkdir -p $(@D) && touch $@

# What compiles and lints; mypy needs torch as well. `test` and `bench` packages follow with the build.
$(TOOLS): constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt torch setuptools ninja ruff mypy clang-format
	touch $@

clean:
	rm -rf build dist *.egg-info sdkernels/_C.*.so sdkernels/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks benchmarks/out benchmarks/paper/out
	find sdkernels tests benchmarks build_tools -name __pycache__ -exec rm -rf {} +
