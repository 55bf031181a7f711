# Needs Python 3.11, make, gcc and a package index; everything else goes into .venv.
#
# Which torch: the lock says torch==2.13.0. Where pip's index offers a CPU build (2.13.0+cpu) pip prefers it; on a machine
# without a GPU set PIP_EXTRA_INDEX_URL (or pip's own configuration) to the index of torch's CPU wheels before `make setup`,
# else pip may fetch the CUDA build, which works and is some gigabytes larger.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format gpu bench peers up down lock clean

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# deepspeed's sdist reads torch while it builds, so torch and the build tools go in first and build isolation is off.
BUILD_PACKAGES := $(shell sed -nE 's/^((pip|setuptools|wheel|ninja|numpy|packaging|torch)==[^ ]+).*/\1/p' requirements.lock)
LOCK_HASH := $(shell sha256sum requirements.lock pyproject.toml 2>/dev/null | sha256sum | cut -c1-16)
STAMP := $(VENV)/.trailmark-$(LOCK_HASH)

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(STAMP) ## make .venv from requirements.lock; seconds when it is up to date

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[1/3] build tools and torch"
	@$(PIP) install -qq --constraint requirements.lock $(BUILD_PACKAGES)
	@echo "[2/3] everything else in requirements.lock: about 180 packages, some minutes"
	@DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) install -qq --no-build-isolation --no-deps --requirement requirements.lock
	@echo "[3/3] trailmark itself"
	@$(PIP) install -qq --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.trailmark-*
	@touch $@

demo: setup ## the whole road on real input; QUICK=1 for the short one
	@$(BIN)/trailmark demo $(if $(filter-out 0,$(QUICK)),--quick)

test: setup ## every test; ARGS="-m 'not slow'" to choose
	@$(BIN)/python -m pytest -q $(ARGS)

check: setup ## ruff, mypy and the layer rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layout.py

format: setup ## let ruff put the code in form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

gpu: ## what needs an NVIDIA GPU; any Python with torch, triton, transformers, safetensors, numpy
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

bench: setup ## quick form of every benchmark, held to its floor
	@for file in $$(grep -l __main__ benchmarks/*.py); do name=$$(basename $$file .py); \
		case $$name in gpu_check) continue;; esac; \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick --check; done

peers: .peers/.installed ## other systems that benchmarks compare with, in a venv of their own (2 GB)

.peers/.installed: benchmarks/peers-requirements.txt
	@$(PYTHON) -m venv .peers
	@.peers/bin/python -m pip install -qq $(filter torch==%,$(BUILD_PACKAGES))
	@.peers/bin/python -m pip install -qq --no-deps --requirement benchmarks/peers-requirements.txt
	@touch $@

up: setup ## start Ray, MLflow and the API here
	@$(BIN)/trailmark up $(ARGS)

down: setup ## stop what `make up` or `make demo` started
	@$(BIN)/trailmark down

lock: setup ## write requirements.lock from what .venv holds
	@{ sed -n '/^#/p' requirements.lock; \
		$(PIP) freeze --all --exclude trailmark | sed -E '/^-e|^#/d; s/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' | LC_ALL=C sort -f; } > requirements.new
	@mv requirements.new requirements.lock

clean: ## remove caches and builds (not .venv, not .trailmark)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
