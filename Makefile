# make demo | test | test-all | claims | mutants | faults | bench | lint: each sets up .venv first and installs what it needs.
PYTHON ?= python3
PY := .venv/bin/python
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all claims mutants faults bench lint clean

# What is installed in .venv already stays, such as a torch for the CPU alone (README).
.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/pip
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The tools for tests and lint, which `make demo` does without.
.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Every experiment at a size for two CPU cores, then the claims in words, plots and a page; a second call goes on where the first ended.
demo: .venv/installed
	PYTHON=$(PY) bash scripts/demo.sh

test: .venv/installed-dev
	$(PY) -m pytest -n 2

test-all: .venv/installed-dev
	$(PY) -m pytest -n 2 -m ''

# Runs the quick claims again and compares each with its recorded figure.
claims: .venv/installed
	$(PY) claims.py check

# Breaks a line of code at a time and demands that a test fails: under 20 minutes.
mutants: .venv/installed-dev
	$(PY) tests/mutants.py

# Breaks every training script on purpose and counts what it withstands: 12 minutes.
faults: .venv/installed-dev
	$(PY) tests/faults.py --out docs/results/faults/faults.json --readme README.md

bench: .venv/installed
	$(PY) bench.py

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	for file in scripts/*.sh scripts/*.bash compression_suite.sh; do bash -n $$file || exit 1; done

clean:
	rm -rf .venv .pytest_cache .ruff_cache
