# Each target sets up what it needs. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: .venv/ready  ## install into .venv with the tested versions

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

quickstart: setup  ## set up, then edit 200 facts of the model in the package
	$(BIN)/python -m lightning_blue fit --config conf/quickstart.yaml

test: setup  ## set up, then run the tests
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

paper-small: setup  ## the paper's studies on 100 facts of the model in the package
	$(BIN)/python -m lightning_blue analyze all --config conf/quickstart.yaml --study.records=100

bench: setup  ## time the package against a textbook implementation
	$(BIN)/python -m benchmarks

kill: setup  ## kill 50 small runs at random moments, resume each, compare to the last bit
	KILLS=50 $(BIN)/python -m pytest tests/test_kill.py -k killed

sweepkill: setup  ## kill a sweep of six small runs three times, compare its table
	SWEEP_KILLS=3 $(BIN)/python -m pytest tests/test_sweep.py -k killed

fuzz: setup  ## make up 1,000 records, files and configurations of each kind, and give them in
	FUZZ=1000 $(BIN)/python -m pytest -n logical tests/test_fuzz.py

docs: .venv/docs-ready  ## build the documentation as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

lint: setup  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy
	$(BIN)/mypy

clean:  ## remove the environment, runs and caches
	rm -rf .venv site runs analyses stats .hypothesis .pytest_cache .mypy_cache .ruff_cache

.PHONY: help setup quickstart test paper-small bench kill sweepkill fuzz docs lint types clean
.DEFAULT_GOAL := help
