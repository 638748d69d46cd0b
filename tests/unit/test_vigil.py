"""Who watches whom closely."""

from __future__ import annotations

import pytest

from meshnode.net.vigil import ALERT_S, Vigil
from tests.adverts import peer_of

NOW = 100.0


@pytest.mark.parametrize("nodes", [2, 3, 4, 10, 100])
def test_everybody_is_watched_by_two_at_any_size(nodes: int) -> None:
    peers = [peer_of(number) for number in range(1, nodes + 1)]
    watched = {us: Vigil(us).close([peer for peer in peers if peer != us], NOW) for us in peers}
    for us in peers:
        assert len(watched[us]) == min(2, nodes - 1)
        watchers = {other for other in peers if us in watched[other]}
        assert watchers == watched[us], "each of a pair, so that it is one conversation"


def test_who_is_gone_leaves_no_gap() -> None:
    peers = [peer_of(number) for number in range(1, 11)]
    us = peers[0]
    vigil = Vigil(us)
    others = peers[1:]
    while len(others) > 1:
        close = vigil.close(others, NOW)
        assert close <= set(others) and len(close) == min(2, len(others))
        others.remove(min(close))


def test_a_silence_makes_it_watch_all_and_doubt_one_for_a_while() -> None:
    peers = [peer_of(number) for number in range(1, 31)]
    vigil = Vigil(peers[0])
    usual = vigil.close(peers[1:], NOW)
    one = next(peer for peer in peers[1:] if peer not in usual)
    vigil.doubt(one, NOW)
    assert vigil.close(peers[1:], NOW + ALERT_S - 1) == usual | {one}
    assert vigil.close(peers[1:], NOW + ALERT_S) == usual
    vigil.alert(NOW + 50)
    assert vigil.close(peers[1:], NOW + 50) == set(peers[1:])
    assert vigil.close(peers[1:], NOW + 50 + ALERT_S) == usual
