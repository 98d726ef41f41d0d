# `make demo` and `make test` each work alone on a fresh machine: they make the virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed  ## train the tiny model on Python's standard library and write runs/tiny/report.html
	$(BIN)/python experiments/train.py --config=configs/tiny.py --workdir=runs/tiny

test: .venv/installed  ## the whole test suite
	$(BIN)/python -m pytest -n 2

lint: .venv/installed  ## what CI checks of the source text
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
