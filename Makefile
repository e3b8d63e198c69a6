# `make` lists the targets. Each one sets up .venv in this clone on first use.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
export NO_MKDOCS_2_WARNING = 1

.PHONY: help demo test check lint docs pages dist fuzz setup clean
help: ## list the targets
	@grep -E '^[a-z][a-z ]*:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## make the virtual environment

# torch comes first and by version: the CPU build serves here, and nothing later may replace it.
$(VENV)/.ready: pyproject.toml tests/models/requirements.txt
	@echo "setting up $(VENV) (first use only) ..."
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python -c "import torch" 2>/dev/null || $(RUN)/pip install -qq --disable-pip-version-check torch==2.13.0
	@$(RUN)/pip install -qq --disable-pip-version-check -e '.[test,docs]'
	@$(RUN)/pip install -qq --disable-pip-version-check --no-deps --ignore-requires-python -r tests/models/requirements.txt
	@touch $@

demo: $(VENV)/.ready ## fold-trunk demo on two real proteins: eager, inductor, trifast
	@$(RUN)/python -m trifast_inductor demo

test check: lint ## all that CI runs: lint, types, the whole test-suite on all cores, the site
	@OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --dist worksteal -W ignore

lint: $(VENV)/.ready ## format, lint and types, without a change
	@$(RUN)/ruff format --check . && $(RUN)/ruff check . && $(RUN)/mypy

docs: $(VENV)/.ready ## the site, in build/site; fails on a link that leads nowhere
	@$(RUN)/python -m mkdocs build -q -f docs/site/mkdocs.yml && echo "build/site/index.html"

pages: $(VENV)/.ready ## write the generated pages again: patterns, support, numerics, plots
	@for page in patterns.page docs.support numerics.page docs.plots; do $(RUN)/python -W ignore -m tests.$$page || exit; done

dist: $(VENV)/.ready ## wheel and sdist in dist/, checked
	@rm -rf dist && $(RUN)/python -m build -q && $(RUN)/python -m twine check --strict dist/*

fuzz: $(VENV)/.ready ## ten thousand random attention-like modules against eager; an hour or more
	@$(RUN)/python -W ignore -m tests.patterns.fuzz

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
