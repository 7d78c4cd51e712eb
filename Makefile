# `make demo` and `make test` do everything on a fresh Linux machine with Python 3.11 or newer, set-up included.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-triton36 lint bench clean

demo: .venv/ready
	rm -rf runs/demo
	$(BIN)/gptfast train shakespeare-char-cpu --data stdlib --out runs/demo
	$(BIN)/gptfast generate runs/demo --prompt "def " --max-new-tokens 400

# as many processes as cores, with a thread each: threads that wait for each other do not share a core with others
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

# the oldest Triton that is supported: kernels interpreted, and compiled for GPUs that are not here
test-triton36: .venv36/ready
	OMP_NUM_THREADS=1 .venv36/bin/python -m pytest -n auto --dist worksteal tests/kernels

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# every suite that this machine can run, then a report: $(RESULTS)/<device>/report.html
RESULTS ?= benchmarks/results
bench: .venv/ready
	$(BIN)/python -m pytest benchmarks --benchmark-only --results $(RESULTS)
	$(BIN)/python -m benchmarks.report $(RESULTS)

clean:
	rm -rf .venv .venv36 .pytest_cache .mypy_cache .ruff_cache build *.egg-info

# all versions are pinned: a plain `torch` would bring another one, with gigabytes of CUDA packages
.venv/ready: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gptfast needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); use make PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# its interpreter needs a NumPy before 2.4
.venv36/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv36
	grep -vE '^(triton|numpy)==' constraints.txt > .venv36/constraints.txt
	.venv36/bin/python -m pip install --quiet --constraint .venv36/constraints.txt \
		--editable . 'triton==3.6.0' 'numpy<2.4' pytest pytest-xdist hypothesis
	touch $@
