# `make demo` and `make test` each work alone on a fresh machine: they make the virtual environment in .venv, of the
# versions in constraints/ that are known to work with that Python. With another PYTHON, they make it anew.
PYTHON ?= python3
# Where pip may look for torch, too: https://download.pytorch.org/whl/cpu spares Linux the gigabytes of CUDA.
TORCH_INDEX ?=
VENV ?= .venv

VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
KNOWN := constraints/python$(basename $(VERSION)).txt
CONSTRAINTS := $(wildcard $(KNOWN))
PIP_INSTALL = install --quiet $(addprefix --constraint ,$(CONSTRAINTS))
INSTALLED := $(VENV)/installed-$(VERSION)
TORCH_INSTALLED := .venv-torch/installed-$(VERSION)
FLAX_INSTALLED := .venv-flax/installed-$(VERSION)
DOCS_INSTALLED := .venv-docs/installed-$(VERSION)
# What depends on jax, numpy and Python most; not what starts many processes, draws pages or lowers V3.
FAST := tests/balance tests/data tests/inference tests/model tests/ops tests/train/test_checkpoint.py tests/train/test_checkpoint_damage.py tests/train/test_programs.py \
  tests/train/test_step.py
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile  # a file's shared fixtures are made once

.PHONY: demo test test-fast test-live lint docs constraints versions clean

demo: versions  ## train the tiny model on Python's standard library and write runs/tiny/report.html
	$(VENV)/bin/python experiments/train.py --config=configs/tiny.py --workdir=runs/tiny

test: versions  ## the whole test suite
	$(PYTEST)

test-fast: versions  ## about half of it
	$(PYTEST) $(FAST)

test-live: $(TORCH_INSTALLED) $(FLAX_INSTALLED)  ## our checkpoints in transformers, and theirs here; our layer in its last Flax model
	.venv-torch/bin/python -c 'import torch, transformers'  # without them the tests would skip themselves
	.venv-torch/bin/python -m pytest tests/interop/test_live_transformers.py
	.venv-flax/bin/python -m pytest tests/model/test_live_flax.py

lint: $(INSTALLED)  ## what CI checks of the source text
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(DOCS_INSTALLED)  ## the pages and the reference as a site in build/site; a warning is an error
	.venv-docs/bin/mkdocs build --strict

constraints:  ## the newest versions that pip serves for PYTHON, into VENV and constraints/; see that `make test` passes
	$(call new_venv,$(VENV))
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	echo '# Known to work with this Python; make installs these versions, make constraints renews them.' >$(KNOWN)
	$(VENV)/bin/pip freeze --exclude-editable >>$(KNOWN)
	touch $(INSTALLED)

versions: $(INSTALLED)
	@$(VENV)/bin/python -c 'import importlib.metadata as of; print("Python $(VERSION), jax", of.version("jax"))'

$(INSTALLED): setup.py $(CONSTRAINTS)
	$(if $(CONSTRAINTS),,@echo 'There is no $(KNOWN): pip picks the newest versions, which may not work.')
	$(call new_venv,$(VENV))
	$(VENV)/bin/pip $(PIP_INSTALL) --editable '.[test]'
	touch $@

$(TORCH_INSTALLED): setup.py $(CONSTRAINTS)
	$(call new_venv,.venv-torch)
	.venv-torch/bin/pip $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 transformers==5.24.0
	.venv-torch/bin/pip $(PIP_INSTALL) --editable '.[test]'
	touch $@

$(FLAX_INSTALLED): setup.py $(CONSTRAINTS)
	$(call new_venv,.venv-flax)
	.venv-flax/bin/pip $(PIP_INSTALL) --editable '.[test]'
	.venv-flax/bin/pip install --quiet 'transformers==4.57.6'  # the last with Flax; it wants older versions of what it needs
	touch $@

$(DOCS_INSTALLED): docs/requirements.txt
	$(call new_venv,.venv-docs)
	.venv-docs/bin/pip install --quiet --requirement docs/requirements.txt  # without the package: it is read, not imported
	touch $@

define new_venv
$(if $(VERSION),,$(error PYTHON = $(PYTHON) does not run; give a Python of 3.11 or later))
$(PYTHON) -m venv --clear $(1)
echo '*' >$(1)/.gitignore
$(1)/bin/pip install --quiet --upgrade pip
endef

clean:
	rm -rf .venv .venv-* runs build *.egg-info
