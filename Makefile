# make demo | make test | make test-all | make bench | make lint: each sets up .venv first if it is not there.
PYTHON ?= python3
PY := .venv/bin/python
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all bench lint clean

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# CF-HoT phase A and its baseline on the prose of the Python library, then its claims and its loss curve.
demo: .venv/installed
	$(PY) phase_a_validation.py --resume auto --output_dir runs/demo/cfhot_a/causal_s0 --data local --tokenizer local \
		--d_model 128 --n_layers 4 --n_heads 4 --d_ff 512 --seq_len 128 --max_steps 400 --grad_accum 1 --lr 1e-3 \
		--warmup_steps 50 --eval_interval 100 --save_interval 200 --log_interval 20 --eval_batches 0 --num_workers 0
	$(PY) claims.py plot runs/demo/cfhot_a
	$(PY) claims.py report --results runs/demo --out runs/demo

test: .venv/installed
	$(PY) -m pytest -n 2

test-all: .venv/installed
	$(PY) -m pytest -n 2 -m ''

bench: .venv/installed
	$(PY) bench.py

lint: .venv/installed
	$(PY) -m ruff check .
	bash -n scripts/*.sh scripts/*.bash compression_suite.sh

clean:
	rm -rf .venv .pytest_cache .ruff_cache
