# make quickstart   the whole story on a laptop, in minutes
# make test         what CI runs: make check, then every test
# make slow         the tests that take minutes each
# make check        lint, format, types
# make bench        measure the training step and the data path; prints ratios, so machines compare
# make study-toy    the toy studies of docs/science.md from nothing, figures included: hours on two
#                   cores; again to go on. One of them: make study-toy STUDIES=toy_isoflop
# make clean        remove what the targets above made, .venv included; quickstart/, toy/ and runs/ stay
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

# Studies whose results are in docs/studies.
STUDIES ?= toy_unique_budgets toy_accuracy toy_ar_dropout toy_ar_input_masking toy_noise_types \
  toy_learning_rate_transfer toy_isoflop
# How toy_accuracy asks the checkpoints of a run.
ASK := --every_checkpoint true --tasks next_word --include_path toy/tasks --num_samples 32 \
  --batch_size 256

.PHONY: quickstart test slow check bench study-toy clean

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
	$(BIN)/python tools/benchmarks/study_runner.py
	$(BIN)/python tools/benchmarks/study_gather.py

study-toy: $(READY)
	$(BIN)/python examples/studies/toy_data.py
	$(BIN)/python examples/studies/toy_tiers.py
	$(BIN)/python examples/studies/toy_task.py
	for study in $(STUDIES); do \
	  set -- --study examples/studies/$$study.yaml --output_dir runs/studies/$$study; \
	  $(BIN)/megatron-dlm study run "$$@" || exit 1; \
	  if [ $$study = toy_accuracy ]; then \
	    ls -d runs/studies/$$study/runs/* | HF_HUB_OFFLINE=1 xargs -P "$$(env -u OMP_NUM_THREADS nproc)" -I RUN \
	      $(BIN)/megatron-dlm evaluate --model RUN $(ASK) || exit 1; \
	  fi; \
	  $(BIN)/megatron-dlm study report "$$@" || exit 1; \
	done

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
