# Each target makes what it needs by itself: a virtual environment in .venv with llcompile, torch and everything that
# the demo, the tests and the checks use. A second run finds the stamp and installs nothing.
#
#   make demo ARGS="--seeds 3"        arguments for the command behind a target
#   make test PYTHON=python3.12       another Python (used when .venv is made)
#   make test VENV=/tmp/venv          another place

PYTHON ?= python3
VENV ?= .venv
DOCS ?= .venv-docs
ARGS ?=
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo check test test-all docs matrix matrix-smoke bench lint format clean

BIN := $(VENV)/bin
STAMP := $(VENV)/.llcompile-installed
SOURCES := llcompile kernels passes patterns tests examples benchmarks
# One torch thread per worker: two workers with two threads each on two cores are slower than one worker alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# The releases that the tests were run with; `make CONSTRAINTS=` takes the newest of everything.
CONSTRAINTS ?= constraints.txt
# pip's own -q shows nothing for minutes; one line for each package shows that something happens.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install $(addprefix -c ,$(CONSTRAINTS))
PIP_LINES := sed -u -n -E -e 's/^ *Collecting ([^ (]+).*/    + \1/p' -e 's/^ *(Downloading .*)/      \1/p' -e '/^Successfully/p'

help:
	@echo "make demo     convert two transformers models, then train one in three ways and compare (at most 6 minutes)"
	@echo "make check    run ruff, mypy and the tests that take under a second (at most 3 minutes)"
	@echo "make test     run the fast tests"
	@echo "make test-all run all tests"
	@echo "make matrix   try a dozen combinations of releases and write docs/compatibility.md (an hour, gigabytes)"
	@echo "make matrix-smoke  try the newest and the oldest torch with the newest transformers"
	@echo "make bench    time the operator on this machine's CPU"
	@echo "make lint     run ruff and mypy"
	@echo "make docs     build a site from docs/, with an API reference, in build/site (environment: .venv-docs)"
	@echo "make format   format the sources with ruff"
	@echo "make clean    remove the environments and all build outputs"

demo: $(STAMP)
	@echo "==> llcompile demo $(ARGS)"
	@$(BIN)/llcompile demo $(ARGS)

check: lint
	@echo "==> the tests that take under a second each (make test runs more)"
	@$(PYTEST) -m "not slow and not long" --durations=5 --durations-min=1 $(ARGS)

test: $(STAMP)
	@echo "==> the fast tests (make test-all runs all)"
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)
	@echo "==> all tests"
	@$(PYTEST) $(ARGS)

# Environments of their own, made and removed one after the other; they need nothing of .venv.
matrix matrix-smoke:
	@$(PYTHON) .ci/matrix.py $(if $(filter matrix,$@),all --write docs/compatibility.md,smoke) $(ARGS)

bench: $(STAMP)
	@echo "==> llcompile bench operator --device cpu $(ARGS)"
	@$(BIN)/llcompile bench operator --device cpu $(ARGS)

docs: $(DOCS)/.installed
	@echo "==> mkdocs build --strict"
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict $(ARGS)
	@echo "==> build/site/index.html"

lint: $(STAMP)
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DOCS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-output
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' here; install Python 3.10 or later, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), llcompile needs 3.10 or later; set PYTHON=python3.11, for example" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> making a virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)

# The docs extra alone: docstrings are read from the source, so that neither torch nor llcompile is needed.
$(DOCS)/.installed: pyproject.toml
	@echo "==> making a virtual environment in $(DOCS)"
	@$(PYTHON) -m venv --clear $(DOCS)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(DOCS)/bin/python -m pip install -q \
	  $$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

# torch comes first and alone, so that pip takes a CPU build where one is on hand and the rest builds upon it.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing torch into $(VENV) (a CPU build is enough; once)"
	@$(PIP) torch | $(PIP_LINES)
	@echo "==> installing llcompile and what its demo, tests and checks use"
	@rm -rf llcompile.egg-info  # an old one would hide new entry points from programs started in this folder
	@$(PIP) -e '.[dev]' | $(PIP_LINES)
	@touch $@
