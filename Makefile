# `make demo` and `make test` do all the set-up they need, into .venv in this folder. Wanted: make, and Python 3.11 or
# newer with its venv module (Debian and Ubuntu: apt install make python3 python3-venv).
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt -c constraints-torch.txt

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VIEWER := $(VENV)/.viewer
LOG := $(VENV)/install.log
# One process a core; each with one thread, or they would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -rs --durations=5

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format test-fast test-slow peers wheel pins clean

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(VIEWER) ## install into .venv; again only when the requirements changed

$(INSTALLED): pyproject.toml constraints.txt constraints-torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "medseg needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV); the first time it takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]' >$(LOG) 2>&1 || \
	  { tail -n 40 $(LOG); echo "the installation failed; all of it: $(LOG)"; exit 1; }
	@touch $@

# NiiVue, for the viewer in reports; without it, or npm, they have pictures only. Tried once.
$(VIEWER): $(INSTALLED)
	@$(BIN)/medseg install-viewer || echo "going on without the viewer; medseg install-viewer adds it at any time"
	@touch $@

demo: setup ## the whole way on phantoms, in minutes
	@$(BIN)/medseg demo

test: lint test-fast test-slow ## all that CI runs

lint: setup ## style, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## mend style and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test-fast: setup ## the tests for between two edits
	@$(PYTEST)

test-slow: setup ## whole stages, and real data where ../shared/data is
	@$(PYTEST) -m slow

# Tests and benchmarks hold medseg against these; they pin what medseg does not, so each has an environment of its own.
peers: .peers/nnunet/.installed .peers/panoptica/.installed ## nnU-Net with MONAI, and panoptica, in .peers

.peers/%/.installed: benchmarks/peers/%.txt
	@$(PYTHON) -m venv .peers/$*
	@.peers/$*/bin/python -m pip install --disable-pip-version-check -r $< >.peers/$*/install.log 2>&1 || \
	  { tail -n 20 .peers/$*/install.log; echo "the peer $* could not be installed"; exit 1; }
	@touch $@

wheel: setup ## the wheel, into dist
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

pins: setup ## write down what is installed now
	@{ sed -n 1p constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v '^torch=='; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove the environment and what was built; never the workspace
	@rm -rf $(VENV) .peers dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
