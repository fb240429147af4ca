PYTHON ?= python3
BIN := .venv/bin
PYTEST := -q -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all

demo: .venv/installed
	$(BIN)/pfgm fit --config digits
	$(BIN)/pfgm sample runs/digits --n 64 --method adaptive_heun \
		--out runs/digits/samples.png --trajectory runs/digits/strip.png
	$(BIN)/pfgm test --config digits

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(PYTEST)

# Also the tests that start processes or train for long.
test-all: test
	$(BIN)/pytest $(PYTEST) -m "process and not slow and not gpu"

# Python >= 3.11 and pip are all it takes; a second run installs only what pyproject.toml changed.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
