# The two commands of the README: `make demo` and `make test`. Both make the
# environment first; it needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/digits
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-all lint clean

help:
	@echo "make demo      train a ResNet with NLCG on real images (digits), about 2 minutes"
	@echo "make test      the linter, the type check and the tests"
	@echo "make test-all  those and the long ones"
	@echo "make lint      the linter and the type check alone"
	@echo "make clean     remove the environment and caches (never runs/)"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nlcg-optax needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/nlcg-train --config=digits_resnet8 --workdir=$(WORKDIR) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest --numprocesses=2 $(ARGS)

test-all: lint
	$(BIN)/python -m pytest --numprocesses=2 -m "" $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
