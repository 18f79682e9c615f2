# `make` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install check demo test test-slow test-faults experiments-tiny docs reference tiny-model bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install edit-cli with the tested versions; done by the other targets too

demo: $(INSTALLED) ## edit 100 facts in the embedded model with MEMIT and show what it did
	$(BIN)/edit-cli evaluate method=memit dataset=counterfact

check: $(INSTALLED) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(INSTALLED) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(INSTALLED) ## run the tests that take minutes too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'not faults' -o faulthandler_timeout=3600

test-faults: $(INSTALLED) ## kill commands at random moments, feed them wrong input, undo every method (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope -m faults -o faulthandler_timeout=14400

experiments-tiny: $(INSTALLED) ## run every script of experiments/ at tiny scale (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_experiments.py -m '' -o faulthandler_timeout=3600

docs: $(INSTALLED) reference ## build the documentation site into build/site; a link that leads nowhere is an error
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

reference: $(INSTALLED) ## write docs/reference, every key, from the code
	$(BIN)/python -m tools.reference

tiny-model: $(INSTALLED) ## train the embedded model and its world again (minutes)
	$(BIN)/python -m tools.tiny_world world

bench: $(INSTALLED) ## time the fast paths against the plain ones (minutes); a table and benchmarks/results.json
	$(BIN)/python benchmarks/bench.py

clean: ## delete .venv and what building left behind; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Nothing is installed again unless one of these files changed.
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "edit-cli needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || "$$found" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,check]'
	@touch $@
