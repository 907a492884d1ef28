# `make` lists the targets. PYTHON makes the virtual environment VENV. VENV=none uses PYTHON's own
# environment as it is: nothing is installed, no network is needed, and only what changed is compiled
# (so `make build VENV=none PYTHON=.venv/bin/python` is the quick way while editing csrc).

# TORCH=2.11.0 builds and tests with that PyTorch, in an environment of its own (`make clean` between
# one PyTorch and the next: the extension lies in the source tree).

PYTHON ?= python3
ifdef TORCH
VENV ?= .venv-torch-$(TORCH)
CONSTRAINTS := build/constraints-torch-$(TORCH).txt
else
VENV ?= .venv
CONSTRAINTS := constraints.txt
endif

BUILT := build/.built

ifeq ($(VENV),none)
RUN := $(PYTHON)
DOCS := $(PYTHON)
CLANG_FORMAT := clang-format
BUILD := $(RUN) setup.py --quiet build_ext --inplace
else
RUN := $(VENV)/bin/python
DOCS := $(VENV)-docs/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
PIP := $(RUN) -m pip install --quiet -c $(CONSTRAINTS)
BUILD := $(PIP) --no-build-isolation -e .
TOOLS := $(VENV)/.tools
FOR_TEST := $(VENV)/.for-test
FOR_BENCH := $(VENV)/.for-bench
FOR_LINT := $(VENV)/.for-lint
# Neither PyTorch nor a build of the package: the API is read from its source.
DOCS_TOOLS := $(VENV)-docs/.tools
# What transformers' tests import.
PEER_REQUIREMENTS := $(PIP) parameterized
endif

.PHONY: help build test test-quick test-whole test-install test-ptx peer-tests bench paper docs gpu-check lint clean

help:
	@echo 'make build       compile the extension (without a compiler: set up the package without it)'
	@echo 'make test        run the tests and the examples in the docstrings: 9 to 20 minutes on two cores (with another PyTorch: TORCH=2.11.0)'
	@echo 'make test-quick  those of them that take seconds, for the edit loop'
	@echo 'make test-whole  run whole test files once more, by other backends, instruction sets and compilers'
	@echo 'make test-install  build wheels and sdist, install them elsewhere, check their types'
	@echo 'make test-ptx    execute all compiled GPU kernels, translated: no GPU is needed, nvcc is'
	@echo 'make peer-tests  run tests of timm and transformers on patched models, compare with unpatched ones'
	@echo 'make bench       run the quick benchmarks, about four minutes on two cores'
	@echo 'make paper       run the experiments of the paper, in their quick form'
	@echo 'make docs        build the documentation into build/site, warnings are errors (half a minute)'
	@echo 'make gpu-check   build into the environment of PYTHON, check all that needs a GPU'
	@echo 'make lint        check style, types and formatting'
	@echo 'make clean       remove what was built, but not $(VENV)'

build: $(BUILT)

# Test files side by side. Threads that wait do not spin: there are more of them than cores then.
SIDE_BY_SIDE := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(BUILT) $(FOR_TEST)
	@echo 'This takes 9 to 20 minutes on two cores; make test-quick runs a part of it'
	$(SIDE_BY_SIDE) --durations 25

test-quick: $(BUILT) $(FOR_TEST)
	$(SIDE_BY_SIDE) -q -m 'not slow and not install and not ptx and not whole'

test-whole: $(BUILT) $(FOR_TEST)
	@echo 'Whole test files by other backends, instruction sets and compilers: 8 to 20 minutes on two cores'
	$(SIDE_BY_SIDE) -m whole --durations 25

test-install: $(BUILT) $(FOR_TEST) $(FOR_LINT)
	$(RUN) -m pytest -m install

test-ptx: $(BUILT) $(FOR_TEST)
	@echo 'Compiles, translates and executes every kernel: 7 to 25 minutes on two cores'
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal -m ptx --durations 0

peer-tests: $(BUILT) $(FOR_TEST)
	$(PEER_REQUIREMENTS)
	$(RUN) tests/peers/run.py $(PEERS)

bench: $(BUILT) $(FOR_BENCH)
	$(RUN) -m benchmarks --preset quick

paper: $(BUILT) $(FOR_BENCH)
	$(RUN) -m benchmarks.paper claim all --preset quick

docs: $(DOCS_TOOLS)
	NO_MKDOCS_2_WARNING=1 $(DOCS) -m mkdocs build --quiet --strict
	@echo 'read it, with search: $(PYTHON) -m http.server --directory build/site'

gpu-check:
	$(PYTHON) .ci/gpu_check.py

lint: $(FOR_LINT)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror \
		$$(find csrc tests/cuda_emulation tests/ptx -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

# Folders are listed by find too: a deleted source is a change.
$(BUILT): $(TOOLS) pyproject.toml setup.py $(shell find csrc build_tools/*.py)
	@echo 'Building the package and, where there is a compiler, its extension: about two minutes on two cores'
	$(BUILD)
	mkdir -p $(@D) && touch $@

# What compiles.
$(TOOLS): $(CONSTRAINTS)
	@echo 'Installing PyTorch into $(VENV): 0.8 GB for a CPU, several for CUDA; minutes, as the network goes'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools ninja
	touch $@

# The package is there already, so that pip installs what its extras name. The libraries come without
# their dependencies: each asks for torch, and pip would bring another build of it.
$(FOR_TEST): $(CONSTRAINTS) pyproject.toml tests/requirements.txt | $(BUILT)
	@echo 'Installing what the tests need into $(VENV): 1.4 GB'
	$(PIP) --no-deps -r tests/requirements.txt
	$(PIP) 'sdkernels[test,bench]'
	touch $@

$(FOR_BENCH): $(CONSTRAINTS) pyproject.toml | $(BUILT)
	@echo 'Installing what the benchmarks need into $(VENV): 0.4 GB'
	$(PIP) --no-deps timm torchvision
	$(PIP) 'sdkernels[bench]'
	touch $@

# mypy reads torch.
$(FOR_LINT): $(CONSTRAINTS) | $(TOOLS)
	$(PIP) ruff mypy clang-format
	touch $@

$(DOCS_TOOLS): $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)-docs
	$(DOCS) -m pip install --quiet -c $(CONSTRAINTS) mkdocs-material 'mkdocstrings[python]'
	touch $@

# torchvision 0.(N + 15) is made for torch 2.N, which has its own wishes for Triton and setuptools; of
# the latter, what an environment of Python 3.11 comes with does not know pyproject.toml's licence.
build/constraints-torch-%.txt: constraints.txt Makefile
	mkdir -p build
	minor=$$(echo $* | cut -d. -f2); sed -e 's/^torch==.*/torch==$*/' -e '/^triton==/d' \
		-e 's/^setuptools==.*/setuptools>=77/' -e "s/^torchvision==.*/torchvision==0.$$((minor + 15)).*/" $< > $@

clean:
	rm -rf build dist *.egg-info sdkernels/_C.*.so sdkernels/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks benchmarks/out benchmarks/paper/out
	find sdkernels tests benchmarks build_tools -name __pycache__ -exec rm -rf {} +
