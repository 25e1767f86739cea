PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles the modules that are imported, which are a tenth of those installed.
INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PEERS := .venv-peers
NATIVE := $(wildcard csrc/*.h csrc/*.cuh csrc/*.cu csrc/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-peers check format bench bench-peers bench-gpu quality families clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train and report a dictionary of a real transformer, offline; writes runs/demo
	$(BIN)/fastsae demo

test: $(INSTALLED) ## run the tests, without the slow ones
	$(BIN)/pytest

test-all: $(INSTALLED) ## run the slow tests, which `test` leaves out
	$(BIN)/pytest -m slow

check: $(INSTALLED_DEV) ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(INSTALLED_DEV) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

bench: $(INSTALLED) ## run the quick benchmarks, in under 5 minutes; writes runs/bench
	$(BIN)/python -m fastsae.benchmarks

# The libraries' hundred packages get an environment of their own. Some ask for torchvision, which none of what is
# measured uses, and whose build must be of torch's kind: where it isn't, importing transformers would fail.
bench-peers: $(PEERS)/.installed ## measure a training step of ours and of other libraries, in under 20 minutes
	$(PEERS)/bin/python -m fastsae.benchmarks --suite peers

test-peers: $(PEERS)/.installed ## compare losses and gradients with those of other libraries
	$(PEERS)/bin/python -m pytest tests/test_peers.py

$(PEERS)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) torch
	$(PEERS)/bin/python $(INSTALL) --editable '.[demo,peers,test]'
	$(PEERS)/bin/python -c 'import torchvision' 2>/dev/null || $(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

# Without .venv: the Python given, with what it has. It takes torch, triton, numpy, pytest and, from this folder,
# `pip install --no-deps --no-build-isolation -e .`, which needs no network.
quality: $(INSTALLED) ## check what dictionaries find of known features, in under 6 minutes
	$(BIN)/python -m fastsae.benchmarks --suite gates

families: $(INSTALLED) ## train every architecture on the demo's activations, about a quarter of an hour
	$(BIN)/python -m fastsae.benchmarks --suite families

bench-gpu: ## measure on a CUDA GPU in under ten minutes: .venv, or make bench-gpu PYTHON=...
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m fastsae.benchmarks --suite gpu

clean: ## remove the environment and everything built; results in runs/ stay
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks fastsae/_cuda*.so
	find fastsae kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer: make PYTHON=...")'
	@echo "Installing into $(VENV): about a minute the first time, longer where torch comes with CUDA."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) torch
	$(BIN)/python $(INSTALL) --editable '.[demo,test]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python $(INSTALL) --editable '.[dev]'
	@touch $@
