# Two commands do all set-up on a fresh machine with Python 3.10 or newer and g++: make demo, make test.
PYTHON ?= python3
# Another build of torch: make test TORCH="torch --index-url <where it is>" CONSTRAINTS=
TORCH ?= torch
CONSTRAINTS ?= --constraint constraints.txt
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS)
# Two processes of one thread: most tests are Python, not arithmetic.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2
NATIVE := setup.py $(shell find csrc -type f)

.PHONY: demo test test-slow test-matrix test-newest mutants campaign-bounds long-run fuzz lint bench conformance models docs gallery wheels clean

demo: .venv/installed
	$(BIN)/sharpkern train --preset demo

test: .venv/installed lint
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels_triton

# More processes, models and memory: about five minutes.
test-slow: .venv/installed
	$(PYTEST) -m slow

# Other versions of Python and torch; the pairs are listed in the script.
test-matrix:
	$(PYTHON) scripts/matrix.py

test-newest:
	$(PYTHON) scripts/matrix.py --newest

# Faults planted one at a time: do the tests that belong to them notice? make mutants MUTANTS="eigen --jobs 2"
mutants: .venv/installed
	$(BIN)/python scripts/mutants.py $(MUTANTS)

# Every solver against 5,000 random operators: about ten minutes.
campaign-bounds: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bounds_campaign.py

# 20,000 tracked steps: memory, time per step and accuracy, at the end as at the start? About ten minutes.
long-run: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python scripts/long_run.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/run.py $(BENCH)
	$(BIN)/python -m pytest -q benchmarks/bench_kernels.py

conformance: .venv/installed
	$(BIN)/python scripts/conformance.py --samples 3 --out docs/lab/conformance.md

models: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python scripts/models.py --jobs 2 --out docs/lab/models.md

# The site in build/docs. A warning, a name that is not known and a dead link are errors.
docs: .venv/installed-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky docs build/docs
	$(BIN)/python scripts/check_links.py build/docs

# The pictures of docs/gallery, and what its pages quote: a minute or two.
gallery: .venv/installed
	cd docs/gallery && for script in *.py; do \
		MPLBACKEND=Agg OMP_NUM_THREADS=1 ../../$(BIN)/python $$script || exit 1; done

# The sdist and wheels for the oldest and the newest Python here, each installed and run where there is no compiler.
wheels:
	$(PYTHON) scripts/wheels.py

# Damaged files, 12,000 of each of ten kinds: about five minutes.
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --inputs 12000

.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH) numpy "setuptools>=77" wheel pybind11
	touch $@

.venv/installed: .venv/torch pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation --editable ".[test,dev]"
	touch $@

.venv/installed-docs: .venv/installed
	$(PIP) --no-build-isolation --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv .venv-matrix build dist *.egg-info sharpkern/_C*.so
