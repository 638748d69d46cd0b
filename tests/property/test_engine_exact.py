"""Whatever the chunks, cuts, rewinds and capacities: the same bits come out.

The rule that is held: rows of a prompt agree bit for bit however they are cut into steps, over any segmentation;
decode steps are one row each and agree with each other.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.engine.backend import Array, Stage
from meshnode.engine.null_stage import NullStage
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.requests import load_request
from tests.adapters import ALL, random_pairs
from tests.conformance.tiny_model import VARIANTS, tiny_models
from tests.property.step_scripts import Script, scripts, segmentations

LAYERS, VOCAB = 4, 96
TOKENS = np.random.default_rng(3).integers(0, VOCAB, 301).astype(np.int32)
KINDS = (*VARIANTS, "null")


@cache
def _stage(kind: str, first: int, last: int, use: str = "") -> Stage:
    """A stage of its own for each use."""
    if kind == "null":
        return NullStage(layers=LAYERS, hidden=8, vocab=VOCAB)
    return OnnxStage(load_request(tiny_models()[kind].spec(first, last)))


def _factors(stage: Stage, first: int, last: int, adapted: bool) -> Any:
    if not adapted:
        return {}
    stage.adapt(first, last, ALL)
    return {layer: stage.factors(layer, random_pairs(1, layer), 2.0) for layer in range(first, last)}


@settings(max_examples=40)
@given(
    script=scripts(300),
    kind=st.sampled_from(KINDS),
    cuts=segmentations(LAYERS),
    own_stages=st.booleans(),
    adapted=st.booleans(),
    spare=st.sampled_from([0, 1, 37]),
)
def test_only_the_class_of_a_row_decides(
    script: Script, kind: str, cuts: list[int], own_stages: bool, adapted: bool, spare: int
) -> None:
    """`own_stages`: each segment is loaded by itself, as on another node; else one stage is cut on demand."""
    rows = script.length + 1
    uncut = _stage(kind, 0, LAYERS, "never cut")
    whole = [uncut.open(0, LAYERS, rows, _factors(uncut, 0, LAYERS, adapted))]
    chain = []
    for first, last in pairwise(cuts):
        stage = _stage(kind, first, last) if own_stages else _stage(kind, 0, LAYERS)
        chain.append(stage.open(first, last, rows + spare, _factors(stage, first, last, adapted)))
    script.check(whole, chain, TOKENS[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_may_fill_all_that_was_asked_for(kind: str) -> None:
    """An odd number of rows has an ignored one behind it."""
    tracks = [_stage(kind, 0, LAYERS).open(0, LAYERS, capacity) for capacity in (3, 9)]
    np.testing.assert_array_equal(*(track.run(0, TOKENS[:3], prefill=True, wanted=True).copy() for track in tracks))


def test_null_depends_on_everything() -> None:
    """Order of rows, position, layer and what came before: each of them changes the logits."""
    stage = NullStage(layers=LAYERS, hidden=8, vocab=VOCAB)

    def logits(tokens: list[int], spans: list[tuple[int, int]]) -> bytes:
        x: Array = np.array(tokens, np.int32)
        for first, last in spans:
            x = stage.open(first, last, 16).run(0, x, prefill=True, wanted=True)
        return x.tobytes()

    whole = [(0, LAYERS)]
    seen = [
        logits([1, 2, 3], whole),
        logits([2, 1, 3], whole),
        logits([1, 3], whole),
        logits([9, 2, 3], whole),
        logits([1, 2, 3], [(0, 1), (2, 4)]),
        logits([1, 2, 3], [(0, 2), (1, 4)]),
    ]
    assert len(set(seen)) == len(seen)
    assert logits([1, 2, 3], [(0, 1), (1, 3), (3, 4)]) == seen[0]
