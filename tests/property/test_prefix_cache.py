"""What an engine keeps of ended sessions is never in the way, and never changes an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.errors import Declined
from meshnode.engine.null_stage import NullStage
from meshnode.engine.requests import load_request
from meshnode.engine.sessions import Sessions, kv_bytes
from protocols.pipe.prefixes import PREFIX_STEP, prefixes
from tests.conformance.check_engine import NULL, changed

ROOM = 700  # tokens of all sessions
SPEC = changed(
    NULL,
    architecture=replace(NULL.architecture, context=512),
    max_kv_bytes=ROOM * 4 * 2 * 4 * 4,
    max_sessions=3,
)


@dataclass(frozen=True)
class Deed:
    kind: str  # "open", "close"
    session: int
    text: tuple[int, ...] = ()  # which parts the prompt is made of
    answer: int = 0
    keep: bool = False
    parts: int = 1  # steps of the prompt


DEEDS = st.lists(
    st.one_of(
        st.builds(
            Deed,
            kind=st.just("open"),
            session=st.integers(0, 3),
            text=st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple),
            answer=st.integers(1, 200),
            parts=st.integers(1, 3),
        ),
        st.builds(Deed, kind=st.just("close"), session=st.integers(0, 3), keep=st.integers(0, 3).map(bool)),
    ),
    max_size=25,
)


def _prompt(text: tuple[int, ...]) -> list[int]:
    return [1 + (7 * part + i) % 60 for part in text for i in range(50 + 20 * part)]


def _ask(sessions: Sessions, deed: Deed, *, cached: bool) -> list[int] | str:
    """Tokens of an answer whose session stays open, or the code of a refusal."""
    prompt = _prompt(deed.text)
    name, length = bytes([deed.session]), len(prompt)
    named = prefixes(prompt, seen=range(50, 300, 37)) if cached else ()
    try:
        begin = sessions.open(
            name,
            first=0,
            last=4,
            capacity=length + deed.answer,
            sampling=None,
            prompt=np.asarray(prompt, np.int32),
            prefixes=named,
        )
    except Declined as no:
        return no.code
    assert begin == 0 or begin in [prefix.tokens for prefix in named]
    begin = min(begin, length - 1)
    out: list[int] = []
    cuts = sorted({begin, *(begin + (length - begin) * i // deed.parts for i in range(1, deed.parts)), length})
    steps = [(a, prompt[a:b], True) for a, b in pairwise(cuts)]
    while steps:
        position, rows, prefill = steps.pop(0)
        token = sessions.step(
            name,
            position=position,
            rows=len(rows),
            body=np.asarray(rows, "<i4").tobytes(),
            sample_after=not steps,
            prefill=prefill,
        ).token
        if token is not None:
            out.append(token)
            if len(out) < min(3, deed.answer):
                steps.append((length + len(out) - 1, [token], False))
    return out


@settings(max_examples=150)
@given(DEEDS)
def test_with_and_without_the_same_is_answered_and_refused(deeds: list[Deed]) -> None:
    load = load_request(SPEC)
    stage = NullStage(layers=4, hidden=8, vocab=64)
    with_, without = Sessions(stage, load), Sessions(stage, load)
    held: dict[int, int] = {}  # bytes of the open sessions
    for deed in deeds:
        if deed.kind == "close":
            with_.close(bytes([deed.session]), keep=deed.keep)
            without.close(bytes([deed.session]))
            held.pop(deed.session, None)
        else:
            given_ = _ask(with_, deed, cached=True)
            assert given_ == _ask(without, deed, cached=False)
            if isinstance(given_, list):
                held[deed.session] = kv_bytes(load, 0, 4, len(_prompt(deed.text)) + deed.answer)
        assert sum(held.values()) + with_.kept.nbytes <= load.max_kv_bytes


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(60, 400)), min_size=1, max_size=12))
def test_the_oldest_go_first(asked: list[tuple[int, int]]) -> None:
    """Prompts without a common beginning: those used last are there as far as memory reaches, and no others."""
    sessions = Sessions(NullStage(layers=4, hidden=8, vocab=64), load_request(SPEC))
    used: dict[int, int] = {}  # text -> tokens, the one used last behind all others
    for text, length in asked:
        length = used.get(text, length)
        prompt = [1 + text] * length
        name = b"s"
        begin = sessions.open(
            name,
            first=0,
            last=4,
            capacity=length,
            sampling=None,
            prompt=np.asarray(prompt, np.int32),
            prefixes=prefixes(prompt),
        )
        sessions.step(
            name,
            position=min(begin, length - 1),
            rows=length - min(begin, length - 1),
            body=np.asarray(prompt[min(begin, length - 1) :], "<i4").tobytes(),
            sample_after=False,
            prefill=True,
        )
        sessions.close(name, keep=True)
        used.pop(text, None)
        used[text] = length
        long = [length for length in used.values() if length >= PREFIX_STEP]
        kept = [max(prompt.prefixes.values()) for prompt in sessions.kept._prompts]
        assert kept == long[len(long) - len(kept) :], "not the ones used last"
        assert sum(kept) <= ROOM
        assert length < PREFIX_STEP or kept, "the last one has room in any case"
        if sum(long) + max(used.values()) <= ROOM:
            assert kept == long, "dropped without need"
