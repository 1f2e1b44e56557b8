# Everything runs from .venv at the root; the first target that needs it makes it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH ?=

# One thread per process: two contended OpenMP threads are far slower than one.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1

.PHONY: help install demo test test-long check format bench wheel lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo            fine-tune, register, evaluate, deploy and request one image (3 minutes on two free cores)"
	@echo "make test            the tests, but for the long ones (15 minutes)"
	@echo "make test-long       those: whole jobs on Ray and Prefect, ended, killed and gone on with; the page in a browser"
	@echo "make check           ruff, mypy, import contracts (with CI set also the wheel)"
	@echo "make bench [BENCH=x] benchmarks; figures go to tests/bench/results/"
	@echo "make format          let ruff format and fix the sources"
	@echo "make lock            rewrite constraints.txt from what is installed"
	@echo "make clean           remove outputs, caches and build results (not .venv)"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 was not found: install it, or run make PYTHON=/path/to/python3.11"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "$(PYTHON) is not Python 3.11 to 3.13: run make PYTHON=/path/to/python3.11"; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

# torch goes first so that the build chosen by its pin is the one every later requirement meets.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/diffusion-blend demo

# Two workers for two cores; a file stays on one of them, with what its tests share.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

test-long: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

check: $(STAMP) $(if $(CI),wheel)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python tests/bench/run.py $(BENCH)

# The four packages must import from the built wheel, away from the checkout.
wheel: $(STAMP)
	rm -rf build/wheel dist
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps -w dist .
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH="$$PWD" ../../$(BIN)/python -P -c "import blend, flows, infra, workers, pathlib; \
		here = pathlib.Path.cwd(); \
		[print(p.__name__, 'imports from the wheel') for p in (blend, flows, infra, workers) \
		if pathlib.Path(p.__file__).is_relative_to(here) or exit(f'{p.__file__} is not from the wheel')]"

lock: $(STAMP)
	{ head -2 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia|triton|#)' \
		| sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > build.lock && mv build.lock constraints.txt

clean:
	rm -rf outputs build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
