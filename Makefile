# meshnode: everything on a fresh machine with Python 3.11+, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock scripts/setup
	PYTHON=$(PYTHON) sh scripts/setup $(VENV)
	touch $@

# A bootstrap peer and three nodes answer a question; the receipt is build/demo.json.
demo: setup
	$(BIN)/meshnode demo --cache build/cache --json build/demo.json

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -q

clean:
	rm -rf build demo bench-out .mypy_cache .ruff_cache .pytest_cache
