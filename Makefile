# The two commands of the README: `make demo` and `make test`. Both make the
# environment first; it needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/digits
ARGS ?=

BIN := $(VENV)/bin
# Byte code is made by all cores, and not by pip, which has one for it.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# What is installed into the environment: what the demo needs, and what the tests need.
TRAIN_INSTALLED := $(VENV)/.installed-train
TEST_INSTALLED := $(VENV)/.installed-test

.PHONY: help demo test tests test-all lint docs linkcheck dist clean

help:
	@echo "make demo      train a ResNet with NLCG on real images (digits), about 2 minutes"
	@echo "make test      the linter, the type check and the tests"
	@echo "make test-all  those and the long ones"
	@echo "make lint      the linter and the type check alone"
	@echo "make docs      the documentation, in docs/_build/html"
	@echo "make linkcheck whether the documentation's links into the web still lead there"
	@echo "make dist      build wheel and sdist, install each alone and try it (TRAIN=1: with [train])"
	@echo "make clean     remove the environment and caches (never runs/)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nlcg-optax needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TRAIN_INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing what training needs into $(VENV) (jax, flax and others, 1.2 GB):"
	@echo "about a minute where the packages come fast. This is done once."
	$(PIP) --editable '.[train]'
	@$(COMPILE)
	@touch $@

$(TEST_INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing what the tests need into $(VENV) (also Sphinx, pyright and"
	@echo "Jupyter, 1.6 GB in all): some minutes. This is done once."
	$(PIP) --editable '.[test]'
	@$(COMPILE)
	@touch $(TRAIN_INSTALLED) $@

demo: $(TRAIN_INSTALLED)
	$(BIN)/nlcg-train --config=digits_resnet8 --workdir=$(WORKDIR) $(ARGS)

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint tests

# A dot is a test that has passed.
tests: $(TEST_INSTALLED)
	@echo "The tests take some minutes on two cores, and several times that beside other work."
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup $(ARGS)

test-all: lint
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup -m "" $(ARGS)

# Warnings are errors; links within the documentation are checked.
docs: $(TEST_INSTALLED)
	$(BIN)/python -m sphinx -b html -n -W --keep-going docs docs/_build/html

linkcheck: $(TEST_INSTALLED)
	$(BIN)/python -m sphinx -b linkcheck docs docs/_build/linkcheck

# Each archive is installed into an environment of its own, and tried out of sight of
# the checkout. The old egg-info goes first: it would name files for the sdist.
dist: $(TEST_INSTALLED)
	@echo "Installing what builds the archives into $(VENV): seconds."
	$(PIP) --editable '.[dist]'
	rm -rf dist *.egg-info
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/archives.py dist
	@set -eu; unset PYTHONPATH; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	for archive in dist/*.whl dist/*.tar.gz; do \
	  echo "$$archive$(if $(TRAIN),[train]) in a fresh environment:"; \
	  $(BIN)/python -m venv --clear "$$fresh/venv"; \
	  echo "Installing it and what it needs: $(if $(TRAIN),minutes,half a minute)."; \
	  "$$fresh/venv/bin/python" -m pip install --disable-pip-version-check \
	    "$$archive$(if $(TRAIN),[train])"; \
	  cp tests/smoke.py "$$fresh"; \
	  (cd "$$fresh"; venv/bin/python -I -W error smoke.py $(if $(TRAIN),--train)); \
	done

clean:
	rm -rf $(VENV) docs/_build docs/notebooks docs/project .pytest_cache .ruff_cache build dist *.egg-info
