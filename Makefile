# Every target sets up what it needs in .venv; a second run starts at once.
#
#   make demo        binarize SmolLM2-135M-Instruct, evaluate it, write build/demo/
#   make test        lint, type check and tests
#   make test-slow   the tests that need a real model or minutes of work
#   make sanitize    the kernels' tests under AddressSanitizer and UBSan
#   make fuzz        damaged checkpoints for the loaders, for FUZZ_SECONDS=60
#   make emulate     the kernels on emulated older processors
#
# On Linux, torch from PyPI is the CUDA build (it runs on a CPU too, but is large). Where pip knows an index or a folder with
# CPU wheels, it takes those.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
FUZZ_SECONDS := 60
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
# Kernels are compiled against the torch that is installed, not against one of the build's own.
BUILD_NEEDS := rm -f src/bimos/kernels/_native.so && $(PIP_INSTALL) --quiet torch scikit-build-core cmake ninja

CMAKE := $(BIN)/cmake -S csrc -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
CMAKE_BUILD := $(BIN)/cmake --build

.PHONY: help install dev demo test lint typecheck format test-slow sanitize fuzz emulate clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one or set PYTHON=/path/to/python" >&2; exit 2; }
	@# Debian ships venv without ensurepip; the system's pip can then install one
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV) install pip; }

$(VENV)/.installed: $(BIN)/python $(REQUIREMENTS)
	$(BUILD_NEEDS)
	$(PIP_INSTALL) --quiet --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python $(REQUIREMENTS)
	$(BUILD_NEEDS)
	$(PIP_INSTALL) --quiet --no-build-isolation -e '.[dev,eval,gpu,logging,lean]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed  ## bimos and what it needs, in .venv

dev: $(VENV)/.installed-dev  ## the same plus test, lint and evaluation tools

demo: $(VENV)/.installed  ## a real model to one bit and back to text, within 25 minutes on 2 cores
	$(BIN)/bimos demo -o build/demo

test: lint typecheck  ## ruff, mypy and the tests
	$(BIN)/pytest --numprocesses $$(nproc 2>/dev/null || echo auto) --maxprocesses 8 --dist loadfile

lint: $(VENV)/.installed-dev  ## ruff
	$(BIN)/ruff check .

typecheck: $(VENV)/.installed-dev  ## mypy
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## ruff's formatter and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(VENV)/.installed-dev  ## the tests that need a real model or minutes of work
	$(BIN)/pytest -m slow --timeout 3600

sanitize: $(VENV)/.installed-dev  ## the kernels' tests with AddressSanitizer and UBSan
	$(CMAKE) -B build/sanitize -DBIMOS_SANITIZE=ON && $(CMAKE_BUILD) build/sanitize --target native
	BIMOS_NATIVE=$(CURDIR)/build/sanitize/_native.so ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" $(BIN)/pytest tests/kernels tests/methods/test_mixing.py tests/methods/test_dbllm.py tests/training/test_attention.py \
		tests/training/test_fused.py tests/training/test_losses.py tests/test_engine.py tests/test_engine_head.py \
		tests/test_direct.py tests/test_fuzzing.py -k "not compile and not starts_without"

fuzz: $(VENV)/.installed-dev  ## damaged checkpoints for the loaders for FUZZ_SECONDS=60, guided by coverage (Linux; atheris)
	$(PIP_INSTALL) --quiet --no-build-isolation -e '.[fuzz]'
	mkdir -p build/fuzz/corpus
	cd build/fuzz && PYTHONPATH=$(CURDIR)/tests HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error $(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzzing.py \
		corpus -max_total_time=$(FUZZ_SECONDS) -timeout=60 -rss_limit_mb=4096 -max_len=120 -len_control=0

emulate: $(VENV)/.installed  ## the kernels on emulated processors without AVX-512, and without AVX2 (needs qemu-user)
	$(CMAKE) -B build/emulate && $(CMAKE_BUILD) build/emulate --target levels
	qemu-x86_64 -cpu Nehalem build/emulate/levels scalar
	qemu-x86_64 -cpu Haswell build/emulate/levels avx2

clean:  ## forget .venv and everything built
	rm -rf $(VENV) build dist src/bimos/kernels/_native*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
