"""An adapter in a mesh of real nodes: fetched from the node that has it, and the tokens of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from meshnode.core.errors import Declined
from meshnode.core.paths import Paths
from meshnode.engine.port import AdapterSpec
from meshnode.model.adapter import build_adapter
from meshnode.publisher.quality import sample_tokens
from meshnode.store.blob_store import BlobStore
from protocols.adapter.manifest import decode_adapter
from protocols.delta.frame import Frame, Target
from protocols.ids import DAG_CBOR, Cid, cid_of
from protocols.pipe.messages import Sampling
from tests.model.real_mesh import LAYERS, alone, ask, model_folder, real_mesh

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.slow]

VARIANT, TOKENS, GREEDY = "int4", 16, Sampling(seed=0)
TARGETS = (
    Target("q_proj", 576, 576),
    Target("v_proj", 576, 192),
    Target("gate_proj", 576, 1536),
    Target("down_proj", 1536, 576),
)


def frame(base: Cid) -> Frame:
    return Frame(base=base, rank=8, alpha=16, targets=TARGETS, first=4, last=LAYERS, seed=3)


@pytest.mark.long
def test_three_nodes_answer_with_the_adapter_that_one_of_them_has() -> None:
    prompt = sample_tokens(model_folder(VARIANT) / "tokenizer.json", 40)
    with real_mesh(VARIANT, 3) as mesh:
        keeper, asker = mesh.members[0], mesh.members[1]
        base = Cid(keeper.client.status().model.manifest)
        shape = frame(base)
        with closing(BlobStore(Paths(keeper.folder).content, 1 << 34)) as store:
            adapters = []
            for seed in (1, 2):
                vector = shape.initial()
                vector[:] += np.random.default_rng(seed).standard_normal(len(vector)).astype(np.float32) * np.float32(
                    0.02
                )
                adapters.append(build_adapter(shape, vector, store, version=seed, pin="learned"))
            expected = {"none": alone(VARIANT).answer(prompt, TOKENS, GREEDY)}
            for cid in adapters:
                alone(VARIANT).take(_whole(store, shape, cid))
                expected[cid] = alone(VARIANT).answer(prompt, TOKENS, GREEDY, cid)
            assert len({tuple(tokens) for tokens in expected.values()}) == 3
            names = [*adapters, "none"] * 2
            with ThreadPoolExecutor(len(names)) as pool:
                answers = list(pool.map(lambda name: _ask(asker, prompt, name), names))
            for name, answer in zip(names, answers, strict=True):
                assert answer["token_ids"] == expected[name], name
                assert answer["adapter"] == ("" if name == "none" else name)
            assert len(answers[0]["route"]) == 3
            assert ask(asker, token_ids=prompt, max_tokens=TOKENS)["token_ids"] == expected["none"]
            foreign = build_adapter(frame(cid_of(DAG_CBOR, b"?")), shape.initial(), store, version=3, pin="learned")
            with pytest.raises(Declined, match="was made for the release") as refused:
                _ask(asker, prompt, foreign)
            assert refused.value.code == "bad-adapter"


def _ask(member: object, prompt: list[int], adapter: str) -> dict[str, object]:
    return ask(member, token_ids=prompt, max_tokens=TOKENS, adapter=adapter)  # type: ignore[arg-type]


def _whole(store: BlobStore, shape: Frame, cid: Cid) -> AdapterSpec:
    block = store.block(cid)
    assert block is not None
    files = decode_adapter(block).files(0, LAYERS)
    paths = {layer: store.path(file.cid) for layer, file in files.items()}
    return AdapterSpec(
        name=cid,
        first=shape.first,
        last=shape.last,
        rank=shape.rank,
        alpha=shape.alpha,
        targets=tuple(target.name for target in shape.targets),
        layers={layer: path for layer, path in paths.items() if path is not None},
    )
