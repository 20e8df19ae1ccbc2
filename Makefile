# Everything runs in .venv, which `make install` makes once; afterwards no network is needed.
PYTHON ?= python3
BIN    := .venv/bin
MODEL  ?=
ARGS   ?=
POLICIES ?= off,fixed:3

.PHONY: install serve test check bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Outpace needs Python 3.11 or later; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev,bench,train,eval]'
	@touch $@

serve: install  ## serve MODEL (default: SmolLM2-135M-Instruct) on 127.0.0.1:8000; more flags in ARGS
	$(BIN)/outpace serve $(MODEL) $(ARGS)

test: install  ## the whole suite, on the CPU
	$(BIN)/python -m pytest $(ARGS)

check: install  ## format, lint, types, import rule
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

bench: install  ## POLICIES against each other over HTTP, some minutes; table, JSON and plots in results/
	$(BIN)/outpace bench sweep --policies $(POLICIES) --serve-args '$(MODEL) --spec-method prompt_lookup' \
	  --concurrency 1,4,16 --repetitions 3 --ignore-eos --json results/$(shell date +%Y%m%d-%H%M%S).json $(ARGS)

clean:
	rm -rf .venv
