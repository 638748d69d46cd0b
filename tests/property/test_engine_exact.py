"""Whatever the chunks, cuts, rewinds and capacities: the same bits come out.

The rule that is held: rows of a prompt agree bit for bit however they are cut into steps, over any segmentation;
decode steps are one row each and agree with each other.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.engine.backend import Array, Stage
from meshnode.engine.null_stage import NullStage
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.process import load_request
from tests.conformance.tiny_model import VARIANTS, tiny_models
from tests.property.step_scripts import Script, scripts, segmentations

LAYERS, VOCAB = 4, 96
PROMPT = np.random.default_rng(3).integers(0, VOCAB, 300).astype(np.int32)
ANSWER = np.random.default_rng(4).integers(0, VOCAB, 6).astype(np.int32)
KINDS = (*VARIANTS, "null")


@cache
def uncut(kind: str) -> Stage:
    """The whole model in one segment; never asked for a part of it."""
    return _stage(kind, 0, LAYERS)


@cache
def cut_on_demand(kind: str) -> Stage:
    return _stage(kind, 0, LAYERS)


@cache
def _stage(kind: str, first: int, last: int) -> Stage:
    if kind == "null":
        return NullStage(layers=LAYERS, hidden=8, vocab=VOCAB)
    return OnnxStage(load_request(tiny_models()[kind].spec(first, last)))


@cache
def reference(kind: str, length: int) -> Array:
    """Logits (7, vocab) after the first `length` tokens of the prompt, in one step, and after each answer token."""
    track = uncut(kind).open(0, LAYERS, length + len(ANSWER))
    rows = [track.run(0, PROMPT[:length], prefill=True, wanted=True).copy()]
    for i, token in enumerate(ANSWER):
        rows.append(track.run(length + i, np.array([token], np.int32), prefill=False, wanted=True).copy())
    return np.stack(rows)


def sizes(length: int) -> st.SearchStrategy[list[int]]:
    """Chunk sizes that add up to `length`; one-row chunks and tiles of 128 plus one are drawn often."""
    borders = st.lists(
        st.integers(1, length - 1) | st.sampled_from([1, 2, length - 1, min(129, length - 1)]), max_size=5
    )
    return borders.map(lambda b: np.diff(sorted({0, *b, length})).tolist())


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[int], int]:
    length = draw(st.integers(2, 300) | st.sampled_from([2, 3, 129, 257]))
    first = draw(sizes(length))
    again = draw(sizes(length))
    cuts = sorted({0, LAYERS, *draw(st.lists(st.integers(1, LAYERS - 1), max_size=3))})
    spare = draw(st.sampled_from([0, 1, 37]))
    return length, first, again, cuts, spare


@settings(max_examples=15)
@given(run=runs(), kind=st.sampled_from(KINDS), own_stages=st.booleans())
def test_chunks_cuts_and_rewinds_are_exact(
    run: tuple[int, list[int], list[int], list[int], int], kind: str, own_stages: bool
) -> None:
    length, first, again, cuts, spare = run
    spans = list(pairwise(cuts))
    expected = reference(kind, length)
    tracks = [
        (_stage(kind, a, b) if own_stages else cut_on_demand(kind)).open(a, b, length + len(ANSWER) + spare)
        for a, b in spans
    ]

    def step(position: int, tokens: Array, prefill: bool) -> Array:
        x = tokens
        for track in tracks:
            x = track.run(position, x, prefill=prefill, wanted=True).copy()
        return x

    def prompt(chunks: list[int], start: int) -> Array:
        position, out = 0, np.empty(0)
        for rows in chunks:
            if position + rows > start:
                out = step(position, PROMPT[position : position + rows], prefill=True)
            position += rows
        return out

    def answer() -> None:
        for i, token in enumerate(ANSWER):
            out = step(length + i, np.array([token], np.int32), prefill=False)
            np.testing.assert_array_equal(out, expected[1 + i])

    np.testing.assert_array_equal(prompt(first, 0), expected[0])
    answer()
    step(length // 2, PROMPT[::-1][: length - length // 2].copy(), prefill=True)  # other words, to be forgotten
    np.testing.assert_array_equal(prompt(again, length // 2), expected[0])
    answer()


@settings(max_examples=10)
@given(kind=st.sampled_from(KINDS), window=st.integers(2, len(ANSWER)))
def test_several_rows_after_a_decode_are_the_kernel_of_prompts(kind: str, window: int) -> None:
    """Checking drafts: rows after the prompt in one step give what the same rows as prompt give."""
    length = 40
    track = uncut(kind).open(0, LAYERS, 64)
    track.run(0, PROMPT[:length], prefill=True, wanted=False)
    seen = track.run(length, ANSWER[:window], prefill=False, wanted=True).copy()
    other = uncut(kind).open(0, LAYERS, 64)
    whole = np.concatenate([PROMPT[:length], ANSWER[:window]])
    np.testing.assert_array_equal(seen, other.run(0, whole, prefill=True, wanted=True))


@settings(max_examples=15)
@given(script=scripts(200), kind=st.sampled_from(KINDS), cuts=segmentations(LAYERS))
def test_only_the_class_of_a_row_decides(script: Script, kind: str, cuts: list[int]) -> None:
    tokens = np.concatenate([PROMPT[: script.length], PROMPT[:1]])
    whole = [uncut(kind).open(0, LAYERS, script.length + 1)]
    chain = [cut_on_demand(kind).open(a, b, script.length + 1) for a, b in pairwise(cuts)]
    script.check(whole, chain, tokens)


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
