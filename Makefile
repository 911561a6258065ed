# `make` alone lists the targets. Python 3.11 to 3.13 is all that must be there: `make PYTHON=python3.12 quickstart`.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# One environment with everything in it: beside PyTorch the tools for tests and lint weigh little, and so
# `make test` after `make quickstart` starts at once. The stamp is younger than what it was installed from.
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-browser test-all lab gallery lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

quickstart: $(INSTALLED) ## make clips, train X-CLIP on them, evaluate, draw its attention; results in runs/
	$(BIN)/xclip-lab quickstart

test: $(INSTALLED) ## the fast tests; says what was skipped and why
	$(PYTEST) -m "not slow" -n $(WORKERS) --dist worksteal

# The slow tests run one after the other: some of them take all cores.
test-all: test ## every test
	$(PYTEST) -m slow

test-browser: $(INSTALLED) ## the slow tests that drive JupyterLab in Chromium, where that is installed
	$(PYTEST) tests/browser

lab: $(INSTALLED) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

gallery: $(INSTALLED) ## the notebooks executed on a quickstart run, as pages in runs/gallery/
	$(BIN)/python scripts/gallery.py

lint: $(INSTALLED) ## format, lint, types, stripped notebooks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify --keep-id $(NOTEBOOKS))

clean: ## remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) build xclip_lab.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

install: $(INSTALLED) ## only set up .venv

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("$(PYTHON) is Python %d.%d, xclip-lab needs 3.11 to 3.13: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@
