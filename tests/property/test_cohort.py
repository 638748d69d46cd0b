"""Whatever is lost, late or said differently: a mean is right, and nobody's vector can be laid open."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.cohort.cohorts import threshold_of
from protocols.cohort.machine import State
from protocols.cohort.messages import Word, open_word
from protocols.errors import RemoteProtocolError
from tests.cohorts import NAMES, STEPS, Table

CLOSE = 1e-5
COUNTS = st.integers(4, 8)


def right(table: Table, honest: set[int]) -> None:
    """Means are those of their survivors, all of one set, and no honest member is blamed. (A liar among the survivors
    spoils the mean, as it could with its vector; pads that do not cancel out are seen.)"""
    sets = set()
    for number in honest:
        member = table.members[number]
        assert not honest & {blamed for blamed, _ in member.blamed}
        if member.mean is not None:
            assert member.machine.state is State.DONE
            assert len(member.survivors) >= table.cohort.threshold
            sets.add(member.survivors)
            np.testing.assert_allclose(member.mean, table.mean(member.survivors), atol=CLOSE)
    assert len(sets) <= 1


def hidden(table: Table, liars: set[int]) -> None:
    """Nobody ever has enough shares of both secrets of an honest member, the liars' own shares counted."""
    t = table.cohort.threshold
    for owner, (seed, key) in table.revealed().items():
        assert owner in liars or not (len(seed | liars) >= t and len(key | liars) >= t), owner
    for number, member in enumerate(table.members):
        if number not in liars:
            assert len({word.reveal for word in member.said if word.reveal is not None}) <= 1


@settings(max_examples=25, deadline=None)
@given(COUNTS, st.data())
def test_exact_whoever_vanishes_and_whatever_is_slow(count: int, data: st.DataObject) -> None:
    most = count - threshold_of(count)
    gone = data.draw(st.lists(st.integers(0, count - 1), max_size=most, unique=True))
    table = Table(count, seed=data.draw(st.integers(0, 1000)))
    for number in gone:
        table.members[number].leaves = data.draw(st.sampled_from(STEPS[:4]))
    slow = data.draw(st.floats(0.01, 1.0))
    table.delay = lambda sender, listener: table.rng.uniform(0, slow)
    starts = [table.rng.uniform(0, 200) for _ in range(count)]
    table.starts = lambda number: starts[number]
    table.run()
    right(table, set(range(count)))
    hidden(table, set())
    assert all(member.mean is not None for member in table.there), [member.failed for member in table.there]


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.floats(0, 0.3), st.floats(0.1, 60), st.integers(0, 1000), st.integers(0, 4))
def test_losses_and_delays_beyond_all_patience(count: int, lost: float, slow: float, seed: int, gone: int) -> None:
    table = Table(count, seed=seed)
    for number in table.rng.sample(range(count), min(gone, count)):
        table.members[number].leaves = table.rng.choice(STEPS)
    table.delay = lambda sender, listener: None if table.rng.random() < lost else table.rng.uniform(0, slow)
    table.run()
    right(table, set(range(count)))
    hidden(table, set())


def lie(word: Word, listener: int, kind: str) -> Word:
    """What a liar tells the odd ones."""
    if listener % 2 == 0:
        return word
    if kind == "keys":
        return replace(word, keys=replace(word.keys, mask=word.keys.seal))
    if kind == "shares" and word.shares is not None:
        given = tuple(replace(one, key=bytes(32)) for one in word.shares.given)
        return replace(word, shares=replace(word.shares, given=given))
    if kind == "masked" and word.masked is not None:
        return replace(word, masked=replace(word.masked, cid=word.masked.cid[:-1] + b"\0"))
    if kind == "survivors" and word.reveal is not None:
        fewer = word.reveal.survivors & (word.reveal.survivors - 1)
        return replace(word, reveal=replace(word.reveal, survivors=fewer or word.reveal.survivors))
    return word


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.sampled_from(("keys", "shares", "masked", "survivors")), st.floats(0.1, 20), st.integers(0, 1000))
def test_liars_below_a_third_lay_nothing_open(count: int, kind: str, slow: float, seed: int) -> None:
    table = Table(count, seed=seed)
    most = 2 * threshold_of(count) - count - 1
    liars = set(table.rng.sample(range(count), table.rng.randint(1, most)))
    for number in liars:
        table.members[number].lies = lambda word, listener: lie(word, listener, kind)
    table.delay = lambda sender, listener: table.rng.uniform(0, slow)
    table.run()
    hidden(table, liars)
    right(table, set(range(count)) - liars)


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_noise_is_no_word(data: bytes) -> None:
    try:
        open_word(data)
    except RemoteProtocolError:
        return
    raise AssertionError("noise was taken for a word of " + ", ".join(NAMES))
