PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test

demo: .venv/installed
	$(BIN)/python train.py fit --config configs/digits.yaml
	$(BIN)/python sample.py runs/digits/checkpoints/last.ckpt --n 64 --method adaptive_heun \
		--out runs/digits/samples.png --trajectory runs/digits/strip.png
	$(BIN)/python train.py test --config configs/digits.yaml

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n logical --maxprocesses 8 --dist worksteal

# Python >= 3.11 and pip are all it takes; a second run installs only what pyproject.toml changed.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
