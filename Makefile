# Everything a newcomer or CI needs: make setup, check, test, demo. The virtual environment is made on demand.
PYTHON ?= python3
VENV ?= .venv
TASK ?= classification
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup pycuda check test demo nightly clean

setup: $(READY)

# torch is named on its own first: with it in place nothing else pulls a build with CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# PyCUDA comes as source and takes minutes to compile; with it the tests of the GPU runtime run, too.
pycuda: $(READY)
	$(BIN)/python tests/gpu/driver/install_pycuda.py --constraint constraints.txt

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2

# Thousands of generated graphs through the fusion and every lowering, which says what it generated;
# then all that is marked so, e.g. the kernels compiled for every architecture.
nightly: $(READY)
	$(BIN)/python -m pytest tests/test_generated.py --hypothesis-profile=nightly -v --capture=no
	$(BIN)/python -m pytest -m nightly --numprocesses 2

demo: $(READY)
	$(BIN)/hydra-edge demo --task $(TASK) --output demo$(if $(filter-out classification,$(TASK)),/$(TASK))

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
