"""Answers with a form: every text that is drawn has it, and what a grammar can do costs its asker alone an error."""

from __future__ import annotations

import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import Declined
from meshnode.engine.null_stage import NullStage
from meshnode.engine.sampling import masked
from meshnode.engine.sessions import Sessions
from meshnode.text.grammar import Grammars
from meshnode.text.limits import Limits
from meshnode.text.port import BAD_GRAMMAR
from meshnode.text.process import TokenizerProcess, open_tokenizer
from protocols.enginewire.messages import Load
from protocols.pipe.messages import Sampling
from tests.schemas import random_schema
from tests.text_files import VOCAB, byte_tokenizer, text_files

EOS = 1
HOT = Sampling(seed=0, temperature_milli=1500)
LOAD = Load(
    number=1,
    kind="null",
    graph="",
    groups=(),
    first=0,
    last=3,
    layers=3,
    hidden=8,
    kv_heads=1,
    head_dim=4,
    vocab=VOCAB,
    context=2048,
    threads=1,
    max_sessions=2,
    max_kv_bytes=1 << 30,
    heads=2,
    graph_name="",
)
LETTERS = byte_tokenizer()
GRAMMARS = Grammars(LETTERS.to_str().encode(), VOCAB, (EOS,))


def draw(seed: int, kind: str, text: str, *, guided: bool = True, most: int = 1500) -> str:
    """An answer of the null engine at temperature 1.5, without its end; cut off at `most` tokens."""
    sessions = Sessions(NullStage(layers=3, hidden=8, vocab=VOCAB), LOAD)
    prompt = np.asarray((5, 6, 7 + seed % 200), np.int32)
    sessions.open(b"s", first=0, last=3, capacity=most + 3, sampling=replace(HOT, seed=seed), prompt=prompt)
    walk = GRAMMARS.begin(kind, text)
    position, rows, out = 0, prompt, list[int]()
    while len(out) < most:
        mask = walk.mask() if guided else b""
        token = sessions.step(
            b"s",
            position=position,
            rows=len(rows),
            body=rows.tobytes(),
            sample_after=True,
            prefill=position == 0,
            mask=mask,
        ).token
        assert token is not None
        if token == EOS:
            break
        out.append(token)
        if guided:
            walk.take(token)
        position, rows = position + len(rows), np.asarray((token,), np.int32)
    answer: str = LETTERS.decode(out)
    return answer


def fits(text: str, check: Any) -> bool:
    try:
        return bool(check(json.loads(text)))
    except ValueError:
        return False


def test_answers_fit_their_schemas() -> None:
    """60 of 60 with masks; the same draws without them fail, so the check can fail."""
    free = 0
    for seed in range(60):
        schema, check = random_schema(random.Random(seed), 3)
        text = json.dumps(schema)
        answer = draw(seed, "json_schema", text)
        assert fits(answer, check), f"seed {seed}: {answer!r} does not fit {text}"
        free += fits(draw(seed, "json_schema", text, guided=False, most=40), check)
    assert free < 6


@pytest.mark.parametrize(
    ("kind", "text", "form"),
    [
        ("regex", "(yes|no), [0-9]{3}", r"(yes|no), [0-9]{3}"),
        ("lark", 'start: "<" name ">"\nname: /[a-z]{1,9}/', r"<[a-z]{1,9}>"),
    ],
)
def test_other_forms(kind: str, text: str, form: str) -> None:
    for seed in range(10):
        answer = draw(seed, kind, text)
        assert re.fullmatch(form, answer), answer


def test_an_object_is_one() -> None:
    walk = GRAMMARS.begin("json_object", "")
    assert [chr(byte) for byte in range(33, 127) if _allowed(walk.mask(), chr(byte))] == ["{"]


def _allowed(mask: bytes, letter: str) -> bool:
    (token,) = LETTERS.encode(letter).ids
    return bool(mask[token >> 3] >> (token & 7) & 1)


def test_the_end_comes_only_where_the_text_may_end() -> None:
    walk = GRAMMARS.begin("regex", "ab?")
    ends = []
    for letter in "ab":
        ends.append(bool(walk.mask()[0] >> EOS & 1))
        walk.take(LETTERS.encode(letter).ids[0])
    assert [*ends, bool(walk.mask()[0] >> EOS & 1)] == [False, True, True]
    assert np.unpackbits(np.frombuffer(walk.mask(), np.uint8)).sum() == 1, "nothing but the end may follow"
    walk = GRAMMARS.begin("regex", "ab?")
    with pytest.raises(Declined, match="leads out of the grammar"):
        walk.take(LETTERS.encode("z").ids[0])


def test_what_is_masked_has_no_chance() -> None:
    logits = np.asarray([3.0, 2.0, 1.0], np.float32)
    assert masked(logits, b"\x06").tolist() == [-np.inf, 2.0, 1.0]
    assert masked(logits, b"\xf8\x00\x01"[::-1]).tolist() == [3.0, -np.inf, -np.inf], "bits beyond are ignored"
    for mask in (b"\x00", b"\xf8"):
        with pytest.raises(Declined, match="allows none"):
            masked(logits, mask)
    with pytest.raises(Declined, match="8 bits for a vocabulary of 9"):
        masked(np.zeros(9, np.float32), b"\xff")


# ---------------------------------------------------------------- in a process of its own


@asynccontextmanager
async def opened(folder: Path, limits: Limits = Limits()) -> AsyncIterator[TokenizerProcess]:
    tokenizer = await open_tokenizer(replace(text_files(folder), eos=(EOS,)), limits)
    try:
        yield tokenizer
    finally:
        await tokenizer.aclose()


WRONG = {
    "no JSON": ("json_schema", b"{", "is no JSON"),
    "a schema that is none": ("json_schema", b'{"type":"objec"}', "can't be used: Invalid type: objec"),
    "brackets": ("json_schema", b"[" * 60_000, "is no JSON: maximum recursion"),
    "an open bracket": ("regex", b"[a-", "the regex can't be used"),
    "an unknown name": ("lark", b"start: foo", 'unknown name: "foo"'),
    "an unknown kind": ("poem", b"x", "no grammar of the kind 'poem'; kinds are json_schema"),
    "bytes that are no text": ("lark", b"\xff\xfe", "the lark can't be used"),
    "a text without an end": ("lark", b"start: start", "the grammar can't be followed: no text fits it"),
}


async def test_a_grammar_in_a_process(tmp_path: Path) -> None:
    """It follows as it does here; wrong ones are told, and nobody else notices."""
    async with opened(tmp_path) as tokenizer:
        walk, guide = GRAMMARS.begin("regex", "ab?c"), await tokenizer.guide("regex", b"ab?c")
        for letter in "abc":
            assert await guide.mask() == walk.mask()
            assert await guide.mask() == walk.mask(), "asking again is no step"
            (token,) = LETTERS.encode(letter).ids
            walk.take(token)
            await guide.take(token)
        for kind, text, words in WRONG.values():
            with pytest.raises(Declined, match=words) as refused:
                await tokenizer.guide(kind, text)
            assert refused.value.code == BAD_GRAMMAR
        assert await guide.mask() == walk.mask()
        await guide.take(EOS + 100)
        with pytest.raises(Declined, match="leads out of the grammar"):
            await guide.mask()
        guide.close()
        assert await tokenizer.encode("ab") == tuple(LETTERS.encode("ab").ids)


async def test_a_grammar_that_wants_too_much(tmp_path: Path) -> None:
    """Whatever the library bounds itself, the process is bounded, too."""
    alternatives = "|".join(f"(?:{chr(97 + i % 26)}.{{{i + 1},{2 * i + 400}}}z)" for i in range(60)).encode()
    async with opened(tmp_path, Limits(bytes=1 << 20)) as tokenizer:
        with pytest.raises(Declined, match=r"memory|can't be (used|followed)") as refused:
            guide = await tokenizer.guide("regex", alternatives)
            for letter in "abcdef" * 400:
                await guide.mask()
                await guide.take(LETTERS.encode(letter).ids[0])
        assert refused.value.code == BAD_GRAMMAR
        assert not tokenizer.lost
