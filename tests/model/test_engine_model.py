"""The engine with the real demonstration model: any number of spans gives the same logits and tokens."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.port import StageSpec
from meshnode.engine.process import EngineProcess, load_request
from protocols.ids import SessionId
from protocols.manifest.messages import Architecture
from tests.long import some
from tests.model.cutting import whole_model
from tests.model.real_mesh import example_folder

pytestmark = [pytest.mark.model, pytest.mark.slow]

LAYERS = 30
SPANS = ((0, 30), (0, 15, 30), (0, 10, 20, 30), (0, 6, 12, 18, 24, 30), (0, 1, 29, 30))
PROMPT = np.random.default_rng(1).integers(10, 40_000, 150).astype("<i4")
TOKENS = 24


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return example_folder()


def spec_of(folder: Path, variant: str, first: int, last: int) -> StageSpec:
    index = json.loads((folder / "index.json").read_text())
    files = index["variants"][variant]
    groups = {f"layer.{i}": folder / files["layers"][i]["path"] for i in range(first, last)}
    if first == 0:
        groups["embed"] = folder / files["embed"]["path"]
    if last == LAYERS:
        groups["head"] = folder / files["head"]["path"]
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in index["architecture"].items()}
    return StageSpec(
        kind="onnx",
        graph=folder / files["graph"]["path"],
        groups=groups,
        first=first,
        last=last,
        architecture=Architecture(**facts),
        threads=1,
        max_sessions=2,
        max_kv_bytes=1 << 30,
    )


def logits_of(folder: Path, variant: str, cuts: tuple[int, ...], chunks: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Logits (1 + TOKENS, vocab) of a greedy answer over a chain of stages."""
    capacity = len(PROMPT) + TOKENS
    stages = [OnnxStage(load_request(spec_of(folder, variant, a, b))) for a, b in pairwise(cuts)]
    tracks = [stage.open(a, b, capacity) for stage, (a, b) in zip(stages, pairwise(cuts), strict=True)]
    position, x = 0, np.empty(0, np.float32)
    for rows in chunks:
        x = PROMPT[position : position + rows]
        position += rows
        for track in tracks:
            x = track.run(position - rows, x, prefill=True, wanted=position == len(PROMPT))
    out = [x.copy()]
    for _ in range(TOKENS):
        x = np.array([x.argmax()], np.int32)
        for track in tracks:
            x = track.run(position, x, prefill=False, wanted=True)
        out.append(x.copy())
        position += 1
    return np.stack(out)


@pytest.mark.parametrize("variant", some(["int4", "int8", "fp32"], "int4"))
def test_every_cut_gives_the_same_logits(smollm2: Path, variant: str) -> None:
    whole = logits_of(smollm2, variant, SPANS[0], (150,))
    assert len(set(whole.argmax(axis=1).tolist())) > 1
    for cuts, chunks in zip(SPANS[1:], ((150,), (64, 64, 22), (129, 21), (1, 149)), strict=True):
        np.testing.assert_array_equal(logits_of(smollm2, variant, cuts, chunks), whole)


async def greedy(folder: Path, variant: str, cuts: tuple[int, ...], prompt: list[int], count: int) -> list[int]:
    """Tokens of an answer over a chain of engine processes."""
    engines = [EngineProcess(spec_of(folder, variant, a, b)) for a, b in pairwise(cuts)]
    session = SessionId(bytes(16))
    out: list[int] = []
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for engine in engines:
                nursery.start_soon(engine.start)
        for engine in engines:
            first, last = engine.spec.first, engine.spec.last
            capacity = len(prompt) + count
            await engine.open(session, first=first, last=last, capacity=capacity, sampling=None, prompt=tuple(prompt))
        position, ids = 0, prompt
        while len(out) < count:
            data, token = np.asarray(ids, "<i4").tobytes(), None
            for engine in engines:
                result = await engine.step(
                    session, position=position, rows=len(ids), data=data, sample=True, prefill=position == 0
                )
                data, token = result.data, result.token
            assert token is not None
            out.append(token)
            position, ids = position + len(ids), [token]
        for engine in engines:
            await engine.stop()
    return out


@pytest.mark.parametrize("variant", some(["int4", "int8", "fp32"], "int4"))
async def test_every_cut_gives_the_same_tokens(smollm2: Path, variant: str) -> None:
    prompt = PROMPT[:40].tolist()
    whole = await greedy(smollm2, variant, SPANS[0], prompt, TOKENS)
    for cuts in SPANS[1:4]:
        assert await greedy(smollm2, variant, cuts, prompt, TOKENS) == whole


async def test_fp32_is_transformers(smollm2: Path) -> None:
    """Three engines say what the checkpoint says in transformers, token by token."""
    import tokenizers
    import torch

    reference = whole_model("example:smollm2")
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    for text in ("The lighthouse was built because", "def fibonacci(n):\n", "東京は"):
        prompt = list(tokenizer.encode(text).ids)
        got = await greedy(smollm2, "fp32", (0, 10, 20, 30), prompt, TOKENS)
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
        best = logits.argmax(dim=1).tolist()
        for i, (ours, theirs) in enumerate(zip(got, best, strict=True)):
            gap = float(logits[i, theirs] - logits[i, ours])
            assert gap < 1e-3, f"{text!r}: token {i} is {ours}, transformers says {theirs}, better by {gap}"
