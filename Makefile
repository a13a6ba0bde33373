# make demo    a sweep on the built-in digits, two to four minutes on two cores, and its report
# make test    ruff, mypy, pytest
# make test-all   the same with every repetition and every long test: CONTRASWEEP_TESTS=all
# make chaos   real drivers, workers, nodes and servers killed, each on its own; 25 to 45 minutes
# make bench   tests/bench/bench_*.py, one after another
#
# PYTHON=python3.12        the interpreter that makes .venv (3.11 or newer)
# PIP_FLAGS=...            for pip install, such as another index of torch's wheels
# DEMO_FLAGS=, PYTEST_FLAGS=   passed on
# JOBS=2                   test files at a time
# CONTRASWEEP_CIFAR10=DIR  CIFAR-10 as a folder of images, for the benchmarks; else they make noise

PYTHON ?= python3
PIP_FLAGS ?=
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
SOURCES := trainer spaces search analysis tests
# Python compiles what it imports; all of torch's and Ray's modules at once would take a minute.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile $(PIP_FLAGS) \
	-c constraints.txt
NAME := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help demo test test-all lint chaos bench clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/installed
	$(BIN)/contrasweep sweep --out runs --name $(NAME) $(DEMO_FLAGS)

# Test files run JOBS at a time, each on one thread: idle threads of one would slow the others.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-all:
	CONTRASWEEP_TESTS=all $(MAKE) test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

chaos: $(VENV)/installed-dev
	@rows=$$(mktemp) && trap 'rm -f "$$rows"' EXIT && status=0; \
	CONTRASWEEP_CHAOS=full CONTRASWEEP_CHAOS_ROWS=$$rows OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/test_chaos_*.py $(PYTEST_FLAGS) || status=$$?; \
	$(BIN)/python tests/chaos.py table "$$rows"; exit $$status

bench: $(VENV)/installed-dev
	@set -e; for file in tests/bench/bench_*.py; do \
		test -e "$$file" || { echo "no benchmarks in tests/bench"; exit 1; }; \
		echo "== $$file"; $(BIN)/python "$$file"; \
	done

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find spaces trainer search analysis tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again only when what is asked for has changed. The development set contains the other.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); minutes the first time, torch is large"
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); minutes the first time, torch is large"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "contrasweep needs Python 3.11 or newer; '$(PYTHON)' is" \
			"$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing)." \
			"Set PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; \
		exit 1; }
