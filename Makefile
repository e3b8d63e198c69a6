# `make` lists the targets. Each one sets up .venv in this clone on first use.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: help demo test fuzz check setup clean
help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## make the virtual environment

# torch comes first and by version: the CPU build serves here, and nothing later may replace it.
$(VENV)/.ready: pyproject.toml tests/models/requirements.txt
	@echo "setting up $(VENV) (first use only) ..."
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python -c "import torch" 2>/dev/null || $(RUN)/pip install -qq --disable-pip-version-check torch==2.13.0
	@$(RUN)/pip install -qq --disable-pip-version-check -e '.[test]'
	@$(RUN)/pip install -qq --disable-pip-version-check --no-deps -r tests/models/requirements.txt
	@touch $@

demo: $(VENV)/.ready ## fold-trunk demo on two real proteins: eager, inductor, trifast
	@$(RUN)/python -m trifast_inductor demo

test: $(VENV)/.ready ## the whole test-suite, on all cores
	@OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto -W ignore

fuzz: $(VENV)/.ready ## ten thousand random attention-like modules against eager; an hour or more
	@$(RUN)/python -W ignore -m tests.patterns.fuzz

check: $(VENV)/.ready ## everything that is checked before a commit: format, lint, types, tests
	@$(RUN)/ruff format --check . && $(RUN)/ruff check . && $(RUN)/mypy && $(MAKE) test

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
