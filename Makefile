# `make demo` and `make test` run on a fresh Linux machine with Python 3.11 or newer; they include the set-up.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-triton36 lint bench clean

demo: .venv/ready
	rm -rf runs/demo
	$(BIN)/gptfast train shakespeare-char-cpu --data stdlib --out runs/demo
	$(BIN)/gptfast generate runs/demo --prompt "def " --max-new-tokens 400

# one process per core, one thread each: OpenMP threads spin while they wait, which starves the other processes
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

# the oldest supported Triton: kernels interpreted, and compiled ahead of time
test-triton36: .venv36/ready
	OMP_NUM_THREADS=1 .venv36/bin/python -m pytest -n auto --dist worksteal tests/kernels

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# every suite that this machine supports, then a report: $(RESULTS)/<device>/report.html
RESULTS ?= benchmarks/results
bench: .venv/ready
	$(BIN)/python -m pytest benchmarks --benchmark-only --results $(RESULTS)
	$(BIN)/python -m benchmarks.report $(RESULTS)

clean:
	rm -rf .venv .venv36 .pytest_cache .mypy_cache .ruff_cache build *.egg-info

# pinned versions: an unconstrained `torch` pulls gigabytes of CUDA packages
.venv/ready: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gptfast needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); use make PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# NOTE: the interpreter of Triton 3.6 needs NumPy below 2.4
.venv36/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv36
	grep -vE '^(triton|numpy)==' constraints.txt > .venv36/constraints.txt
	.venv36/bin/python -m pip install --quiet --constraint .venv36/constraints.txt \
		--editable . 'triton==3.6.0' 'numpy<2.4' pytest pytest-xdist hypothesis
	touch $@
