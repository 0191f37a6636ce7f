# Five things people and CI do. Each sets up first, in .venv.
#   make demo      the whole job on the embedded model, offline
#   make test      the test suite (minutes)
#   make test-all  and the slow tests (an hour)
#   make lint      ruff and mypy
#   make bench     the figures in the README

PYTHON ?= python3
# Installed first and alone: a looser range may bring gigabytes of another build.
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed
# A process for each core, but not one for each of a hundred: each takes half a GB.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: setup demo test test-all lint format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fourfold needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,megatron]'
	touch $(STAMP)

demo: setup
	$(BIN)/fourfold demo demo-out

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu and not network'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/cpu_sweep.py
	$(BIN)/python benchmarks/synthetic.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/quality.py

clean:
	rm -rf .venv demo-out bench-synthetic bench-calibration bench-ranks build dist .pytest_cache .mypy_cache .ruff_cache
