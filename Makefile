# `make demo` and `make test` each work alone on a fresh machine: they make the virtual environment in .venv.
PYTHON ?= python3
# Where pip may look for torch, too: https://download.pytorch.org/whl/cpu spares Linux the gigabytes of CUDA.
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: demo test test-live lint clean

demo: .venv/installed  ## train the tiny model on Python's standard library and write runs/tiny/report.html
	$(BIN)/python experiments/train.py --config=configs/tiny.py --workdir=runs/tiny

test: .venv/installed  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile  # a file's shared fixtures are made once

test-live: .venv-torch/installed  ## our checkpoints in transformers, and theirs here
	.venv-torch/bin/python -c 'import torch, transformers'  # without them the tests would skip themselves
	.venv-torch/bin/python -m pytest tests/interop/test_live_transformers.py

lint: .venv/installed  ## what CI checks of the source text
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.venv-torch/installed: setup.py
	$(PYTHON) -m venv .venv-torch
	echo '*' > .venv-torch/.gitignore
	.venv-torch/bin/pip install --quiet --upgrade pip
	.venv-torch/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 transformers
	.venv-torch/bin/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-torch runs build *.egg-info
