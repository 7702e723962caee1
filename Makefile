# make quickstart   the whole story on a laptop, in minutes
# make test         what CI runs: make check, then every test
# make slow         the tests that take minutes each
# make check        lint, format, types
# make bench        measure the training step and the data path; prints ratios, so machines compare
# make clean        remove what the targets above made, .venv included; quickstart/ and runs/ stay
#
# The first call makes .venv with PYTHON (3.10 to 3.12). On a CUDA machine: make REQUIREMENTS=gpu ...

PYTHON ?= python3
REQUIREMENTS ?= cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed-$(REQUIREMENTS)

# Test files that run side by side, each with up to four ranks.
WORKERS ?= 2
# The tests start their own ranks; threads of each would only fight over the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test slow check bench clean

quickstart: $(READY)
	$(BIN)/megatron-dlm quickstart

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 25

slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tools/benchmarks/step.py
	$(BIN)/python tools/benchmarks/scored_slots.py
	$(BIN)/python tools/benchmarks/preprocess.py
	$(BIN)/python tools/benchmarks/loader.py
	$(BIN)/python tools/benchmarks/loss.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_dlm tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); megatron-dlm needs Python 3.10, 3.11 or 3.12:" \
	       "make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -f requirements/$(REQUIREMENTS).txt || { \
	  echo "REQUIREMENTS=$(REQUIREMENTS) is not one of cpu, gpu" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c requirements/$(REQUIREMENTS).txt -e '.[dev,plot,hf,eval]'
	@rm -f $(VENV)/.installed-*
	@touch $@
