# Everything a person or the continuous integration runs. `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check format readme clean

# Another Python environment may be active, and its variables must not reach the one made here.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX PIP_TARGET PIP_PREFIX
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_USER := 0

VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: errors only.
PIP := $(BIN)/python -m pip --quiet --quiet install
CODE := src tests tools benchmarks
MODEL := models/python-7m

help:  ## This list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(VENV)/.installed  ## Make .venv and install the package into it

# torch comes first and by its exact version; whatever is installed after it then leaves it alone.
$(VENV)/.installed: pyproject.toml constraints.txt tools/create_venv.sh CMakeLists.txt $(wildcard csrc/*/*)
	@tools/create_venv.sh $(VENV)
	@echo "Installing torch, compiling the kernels and installing the package into $(VENV) (a few minutes the first time) ..."
	@$(PIP) --requirement constraints.txt
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what tests and checks need ..."
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## Quantize the bundled model four ways, measure, recommend: demo/report.html
	@$(BIN)/quern compare $(MODEL) --recipes compact,fast,balanced,rtn4 --choice $(MODEL)/choice.jsonl -o demo

test: $(VENV)/.installed-dev  ## All tests
	@if [ -x tools/install_browser.sh ]; then PATH="$(abspath $(BIN)):$$PATH" tools/install_browser.sh; fi
	@$(BIN)/python -m pytest

check: $(VENV)/.installed-dev  ## Formatter, linter, types, layers, file sizes
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python tools/check_sizes.py

format: $(VENV)/.installed-dev  ## Let the formatter rewrite the code
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix $(CODE)

readme: $(VENV)/.installed  ## Put the table of demo/results.json into both READMEs
	@$(BIN)/python tools/update_readme.py demo/results.json

clean:  ## Remove what was built or cached (.venv stays; delete it by hand to start afresh)
	@rm -rf build dist demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
