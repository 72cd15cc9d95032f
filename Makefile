# `make help` lists what there is. Everything runs in a virtual environment that the targets make themselves.

PYTHON ?= python3
VENV ?= .venv
# Installed before the rest, which then takes it as it is; any torch in the range of pyproject.toml does.
TORCH ?= torch==2.13.0

# make train: algorithm, environment, seed, and further arguments of the zoo's train script
ALGO ?= ppo_ewma
ENV_ID ?= CartPole-v1
SEED ?= 0
TRAIN_ARGS ?= --progress --eval-freq 10000
# make test: parallel workers, and further arguments of pytest
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
# Workers share the cores, and one thread each is the quickest for small networks.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-fast test-all lint type build format install clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

train: $(VENV)/.installed-zoo ## install what training needs, train ALGO on ENV_ID through rl-zoo3, save to logs/
	@$(ONE_THREAD) $(BIN)/sb3-ppo-ewma train --algo $(ALGO) --env $(ENV_ID) --seed $(SEED) $(TRAIN_ARGS)
	@echo "Watch it: $(BIN)/sb3-ppo-ewma enjoy --algo $(ALGO) --env $(ENV_ID) -f logs/   (--no-render: numbers only)"

test: $(VENV)/.installed-dev ## install everything, run the tests but the slow ones
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev ## the tests that take less than a second and start no process, in two minutes
	$(PYTEST) -m "not slow and not long" --ignore-glob="*_zoo_*" --ignore-glob="*_benchmarks*" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev ## all tests, also the slow ones
	$(PYTEST) -m "" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## style and formatting, changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(VENV)/.installed-dev ## strict type check of the package
	$(BIN)/mypy

build: $(VENV)/.installed-dev ## source distribution and wheel in dist/
	rm -rf dist
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m build --outdir dist .

install: $(VENV)/.installed-dev ## only install, into VENV

clean: ## remove the virtual environment and all that the tools wrote, not logs/
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, so that a second call installs nothing.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10 is needed, $(PYTHON) is " + sys.version.split()[0] + "; give another one: make PYTHON=python3.11 ...")'
	@echo "Creating $(VENV) and installing torch, a large download"
	@$(PYTHON) -m venv $(VENV)
	@$(if $(strip $(TORCH)),$(PIP) install --quiet "$(TORCH)")
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	@echo "Installing sb3-ppo-ewma[$*] into $(VENV), a few minutes"
	@$(PIP) install --quiet --editable ".[$*]"
	@touch $@
