# Two commands: `make compare` trains every variant on the digits beside AdamW and SGD and writes a report;
# `make test` runs the tests. Both make .venv first and need no download beyond packages.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= compare-out

.PHONY: compare test coverage lint clean

compare: .venv/installed
	$(BIN)/grng compare --out $(OUT) --resume

# One process a core, each with one thread. A container may see more cores than it is given, so at most four.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4

test: .venv/installed
	$(PYTEST)

coverage: .venv/installed
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --upgrade --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p grng

# BackPACK's requirement on torchvision serves only its examples, and a torchvision that does not match torch breaks
# other packages: so it is installed without its requirements, beside the two that it uses.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'GRNG needs Python 3.11 or newer: make PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel torch==2.13.0
	$(PIP) --no-deps backpack-for-pytorch unfoldNd
	$(PIP) einops
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info $(OUT)
