# Every target sets up what it needs: the first one to run creates .venv, later ones find it ready.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: demo test check format clean

demo: $(INSTALLED)
	$(BIN)/autoprune demo

# One thread per worker: the models of the tests are too small to share.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
