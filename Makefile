# make demo | make test | make test-all | make faults | make bench | make lint: each sets up .venv first if it is not there.
PYTHON ?= python3
PY := .venv/bin/python
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all faults bench lint clean

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Every experiment at a size for two CPU cores, then the claims table and its plots; a second call goes on where the first ended.
demo: .venv/installed
	PYTHON=$(PY) bash scripts/demo.sh

test: .venv/installed
	$(PY) -m pytest -n 2

test-all: .venv/installed
	$(PY) -m pytest -n 2 -m ''

# Breaks every training script on purpose and counts what it withstands: 12 minutes.
faults: .venv/installed
	$(PY) tests/faults.py --out docs/results/faults/faults.json --readme README.md

bench: .venv/installed
	$(PY) bench.py

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	for file in scripts/*.sh scripts/*.bash compression_suite.sh; do bash -n $$file || exit 1; done

clean:
	rm -rf .venv .pytest_cache .ruff_cache
