# Two commands matter: `make book` and `make test`. Each works alone on a fresh clone with Python 3.11 or newer.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
PORT ?= 8000

.PHONY: help book lab serve test test-fast lint receipts clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "On Linux without a GPU, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to save gigabytes."

book: $(VENV)/.book ## run every notebook once and build the book
	@$(BIN)/python book/build.py

lab: $(VENV)/.book ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=notebooks

serve: book ## build the book and serve it on this machine
	@echo "Serving on http://127.0.0.1:$(PORT), stop with Ctrl-C"
	@$(BIN)/python -m http.server --bind 127.0.0.1 -d _build/html $(PORT)

test: $(VENV)/.test ## every test: units, contracts, notebooks, pages in a browser
	@$(BIN)/python -m pytest

test-fast: $(VENV)/.test ## the tests that take under a minute together
	@$(BIN)/python -m pytest -q -m "not slow and not notebook and not page and not real_model"

lint: $(VENV)/.test ## style of code and notebooks, generated cells, no outputs committed
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/nbstripout --verify notebooks/*.ipynb
	@$(BIN)/python book/sync.py --check

receipts: $(VENV)/.book ## write time and memory of the notebooks' runs into their badge rows
	@$(BIN)/python book/build.py --receipts

clean: ## remove what was built, not the environment (.venv) and not the cached models
	rm -rf _build book/_build .pytest_cache .ruff_cache

# ---- the environment: made once, made again when the pins or the package's needs change ----
$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "lcx needs Python 3.11 or newer and found none: install it, or name it: make book PYTHON=/path/to/python" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("lcx needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another one with PYTHON=..." % v[:2])'
	@echo "Making the environment $(VENV) with $(PYTHON) …"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }

$(VENV)/.torch: $(BIN)/python constraints.txt
	@echo "Installing $(TORCH) (one to five minutes the first time) …"
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.book: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing lcx and what the book needs …"
	@$(PIP) -e '.[book]'
	@touch $@

$(VENV)/.test: $(VENV)/.book
	@echo "Installing what the tests need …"
	@$(PIP) -e '.[test]'
	@touch $@
