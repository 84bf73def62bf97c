# The few commands of this project; CI runs the same. Everything happens in .venv, created from $(PYTHON) with pip alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# More options for a recipe: make quickstart ARGS="--task rte --data_dir path/to/rte"
ARGS ?=

.PHONY: help quickstart bench test test-slow test-ray quality style docs dist-check clean

help:
	@echo "make quickstart   train two generated tasks on a real MiniLM, offline (ARGS=... are passed to recipes/quickstart.py)"
	@echo "make bench        what a training step costs against other methods (ARGS=... are passed to recipes/benchmarks/training.py)"
	@echo "make test         the tests, without the slow ones"
	@echo "make test-slow    the slow ones"
	@echo "make test-ray     those that start a local Ray; on a machine that has nothing else to do"
	@echo "make quality      ruff check, ruff format --check, mypy"
	@echo "make style        let ruff fix and format"
	@echo "make docs         the documentation, with all its code run (ARGS=--no-run writes the pages only)"
	@echo "make dist-check   build wheel and sdist, check them, install them into empty environments"
	@echo "make clean        remove the virtual environment and caches"

# One stamp per set of extras: an install is repeated only when what it was made from has changed.
EXTRAS_demo := demo,recipes
EXTRAS_dev := dev
EXTRAS_docs := docs
EXTRAS_release := release

$(VENV)/.%: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) what this needs, about 2 GB, most of it PyTorch. The first time that takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e ".[$(EXTRAS_$*)]"
	@touch $@

quickstart: $(VENV)/.demo
	$(BIN)/python recipes/quickstart.py $(ARGS)

bench: $(VENV)/.demo
	$(BIN)/python recipes/benchmarks/training.py $(ARGS)

# One thread per test process: the tests' models are small, and two processes share the cores better than their threads do.
# Tests of one file stay together as long as there is enough to do (worksteal), so that most of its fixtures are made once.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not ray" $(ARGS)

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not ray" $(ARGS)

test-ray: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray $(ARGS)

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python docs/build.py $(ARGS)

dist-check: $(VENV)/.release
	$(BIN)/python .ci/dist_check.py $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
