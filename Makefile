# Everything a person or the continuous integration runs. `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo run test test-quick check format readme messages messages-compile lock lock-peers test-latest test-lowest clean

# Another Python environment may be active, and its variables must not reach the one made here.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX PIP_TARGET PIP_PREFIX
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_USER := 0

VENV := .venv
BIN := $(VENV)/bin
CODE := src tests tools benchmarks
MODEL := models/python-7m
# Tests run in so many processes, 8 at most: each may hold a model, or start others that do. WORKERS=0: in none but pytest's.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
# A file stays in one process, so that what its tests share is made once; tests/conftest.py says which files come first.
export PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# What needs hardly a process of its own, and one model all the way.
QUICK := tests/golden tests/unit/codecs tests/unit/rotation tests/unit/quantization tests/unit/evaluation \
	tests/unit/generation tests/unit/texts tests/unit/test_metrics.py tests/unit/test_recommend.py \
	$(patsubst %,tests/contract/test_%.py,architectures codecs engines formats observers roundings transforms) \
	'tests/end_to_end/test_quantize.py::test_every_family_survives_the_whole_path[bfloat16-qwen2]'
# Another build of torch, such as TORCH=torch==2.13.0 for PyPI's, and another index of builds without CUDA.
export TORCH TORCH_INDEX

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 26

install: $(VENV)/.installed  ## Make .venv and install the package into it, all versions as locked

INSTALLER := pyproject.toml requirements/torch.txt CMakeLists.txt $(wildcard tools/*install*) tools/create_venv.sh \
	$(wildcard csrc/*/*)

$(VENV)/.installed: requirements/run.txt $(INSTALLER)
	@echo "Installing torch, compiling the kernels and installing the package into $(VENV) (a few minutes the first time) ..."
	@tools/install.sh $(VENV) requirements/run.txt
	@touch $@

# The second list contains the first.
$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	@echo "Installing what tests and checks need ..."
	@$(BIN)/python -m pip --quiet --quiet install --no-deps --only-binary :all: --require-hashes --requirement requirements/dev.txt
	@touch $@

demo: $(VENV)/.installed  ## Quantize the bundled model four ways, measure, recommend: demo/report.html
	@$(BIN)/quern compare $(MODEL) --recipes compact,fast,balanced,rtn4 --choice $(MODEL)/choice.jsonl -o demo

test: $(VENV)/.installed-dev  ## All tests, in as many processes as there are processors (WORKERS=2: in two)
	@if [ -x tools/install_browser.sh ]; then PATH="$(abspath $(BIN)):$$PATH" tools/install_browser.sh; fi
	@$(BIN)/python -m pytest $(PARALLEL)

test-quick: $(VENV)/.installed-dev  ## The one-minute tour: codecs, rounding, formats, engines, one whole run
	@$(BIN)/python -m pytest $(PARALLEL) $(QUICK)

check: $(VENV)/.installed-dev  ## Formatter, linter, types, layers, file sizes
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python tools/check_sizes.py

format: $(VENV)/.installed-dev  ## Let the formatter rewrite the code
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix $(CODE)

# CMake may be the machine's or the environment's.
run:  ## quern-run, a program that runs models without Python: build/run/quern-run
	@export PATH="$(abspath $(BIN)):$$PATH" && cmake -S . -B build/run -DQUERN_RUN=ON > /dev/null && \
		cmake --build build/run --target quern-run --parallel

readme: $(VENV)/.installed  ## Put the table of demo/results.json into both READMEs
	@$(BIN)/python tools/update_readme.py demo/results.json

messages: $(VENV)/.installed-dev  ## Bring the catalogues of other languages in line with the texts in the code
	@$(BIN)/python tools/messages.py update

messages-compile: $(VENV)/.installed-dev  ## Compile the catalogues into what the package reads
	@$(BIN)/python tools/messages.py compile

# uv in an environment of its own. UPGRADE=1: the newest of everything that pyproject.toml allows.
LOCKER := .venv-lock/bin/python tools/lock.py
.venv-lock/.installed: requirements/lock.txt tools/create_venv.sh
	@tools/create_venv.sh .venv-lock
	@.venv-lock/bin/python -m pip --quiet --quiet install --no-deps --only-binary :all: --require-hashes --requirement requirements/lock.txt
	@touch $@

lock: .venv-lock/.installed  ## Bring requirements/*.txt in line with pyproject.toml; UPGRADE=1: with the newest versions
	@$(LOCKER) write $(if $(UPGRADE),--upgrade)

lock-peers: .venv-lock/.installed  ## The same for the environments of other tools (quern peers)
	@$(LOCKER) peers $(if $(UPGRADE),--upgrade)

# Both leave .venv alone and end as pytest ends; warnings are shown there, no errors.
test-latest: .venv-lock/.installed  ## All tests with the newest of everything, in .venv-newest; says what differs
	@tools/test_versions.sh newest

test-lowest: .venv-lock/.installed  ## All tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	@tools/test_versions.sh lowest

clean:  ## Remove what was built or cached (.venv and its like stay; delete them by hand to start afresh)
	@rm -rf build dist demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
