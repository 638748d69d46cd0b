"""What a node believes of the peers that compute for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.policy.experience import FIRST_PAUSE_S, FORGET_S, LAST_PAUSE_S, MAX_PEERS, Experience, Part
from protocols.ids import PeerId

A, B, C = (PeerId(name) for name in "abc")


def test_pauses_grow_and_are_forgiven() -> None:
    seen = Experience()
    now, pauses = 0.0, []
    for _ in range(8):
        pauses.append(seen.failed(A, "it was silent", now))
        assert seen.avoided(now) == {A: "it was silent"}
        now += pauses[-1]
        assert not seen.avoided(now), "it is tried again"
    assert pauses == [15, 30, 60, 120, 240, 480, 600, 600]
    assert (pauses[0], pauses[-1]) == (FIRST_PAUSE_S, LAST_PAUSE_S)
    seen.answered([A])
    assert seen.failed(A, "again", now) == 240, "one answer forgives the half"
    assert seen.failed(A, "again", now + FORGET_S + 1) == FIRST_PAUSE_S


def test_an_answer_ends_the_pause() -> None:
    seen = Experience()
    seen.failed(A, "x", 0.0)
    seen.answered([A, B])
    assert not seen.avoided(0.0)


def test_a_newcomer_counts_as_an_ordinary_peer_whatever_it_says() -> None:
    seen = Experience()
    claims = {A: 900, B: 1000, C: 1}
    assert seen.least_us(claims)[C] == 900
    for peer in (A, B):
        seen.answered([peer])
        seen.measured([Part(peer, 4, 4000)], 4000)
    assert seen.least_us(claims)[C] == 1000, "what was measured is the better yardstick"


def test_a_fast_newcomer_earns_its_speed() -> None:
    seen = Experience()
    for peer in (A, B):
        seen.answered([peer])
        seen.measured([Part(peer, 4, 4000)], 4000)
    least = []
    for _ in range(30):
        seen.answered([C])
        seen.measured([Part(C, 4, 40)], 40)
        least.append(seen.least_us({A: 1000, B: 1000, C: 10})[C])
    assert least == sorted(least, reverse=True)
    assert least[0] > 300
    assert least[-1] < 70


def test_who_is_slower_than_it_says_is_believed_no_more() -> None:
    seen = Experience()
    for _ in range(20):
        seen.answered([A])
        seen.measured([Part(A, 10, 10)], 200_000)  # it says 10 microseconds; the token took 200 ms
    assert seen.least_us({A: 1})[A] == pytest.approx(20_000, rel=0.01)


def test_time_that_nobody_accounts_for_counts_against_each() -> None:
    seen = Experience()
    for _ in range(20):
        seen.answered([A, B])
        seen.measured([Part(A, 1, 1000), Part(B, 1, 0)], 11_000)
    least = seen.least_us({A: 1, B: 1})
    assert (least[A], least[B]) == (6000, 5000)


@given(names=st.lists(st.integers(0, 5000), max_size=3000))
def test_what_is_kept_is_bounded(names: list[int]) -> None:
    seen = Experience()
    for name in names:
        seen.failed(PeerId(str(name)), "x", 0.0)
    assert len(seen.avoided(1.0)) <= MAX_PEERS
