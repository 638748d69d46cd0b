"""When a move may be made."""

from __future__ import annotations

import pytest

from meshnode.policy.moves import Move
from meshnode.policy.patience import CALM_S, DEBOUNCE_CAP_S, DEBOUNCE_S, NEWS_S, URGENT_AFTER_S, Patience

FIRST = Move(target=(0, 4), source=None, exclusive=False, urgent=False, repair=False)
FASTER = Move(target=(0, 4), source=(4, 8), exclusive=False, urgent=False, repair=False)
REPAIR = Move(target=(0, 4), source=(4, 8), exclusive=False, urgent=False, repair=True)
URGENT = Move(target=(0, 4), source=(4, 8), exclusive=False, urgent=True, repair=True)


def at(patience: Patience, move: Move, *, loses: bool = False, fits: bool = True) -> float:
    return patience.allowed_at(move, loses=loses, fits=fits)


def test_nothing_is_decided_while_peers_come_and_go() -> None:
    patience = Patience()
    patience.see("a", 100.0)
    assert at(patience, FIRST) == patience.settled_at == pytest.approx(100 + DEBOUNCE_S)
    patience.see("a", 100.5)
    assert patience.settled_at == pytest.approx(100 + DEBOUNCE_S), "nobody came"
    for step in range(1, 20):
        patience.see(step, 100 + 0.5 * step)
    assert patience.settled_at == pytest.approx(109.5 + DEBOUNCE_S), "each burst ends by its own"


def test_a_burst_that_does_not_end_is_not_waited_for() -> None:
    patience = Patience()
    for step in range(8):
        patience.see(step, 100 + 0.4 * step)
    assert patience.settled_at == pytest.approx(100 + DEBOUNCE_CAP_S)


def test_a_first_place_waits_for_a_mesh_that_can_hold_the_model() -> None:
    patience = Patience()
    patience.see("a", 100.0)
    assert at(patience, FIRST, fits=False) == pytest.approx(100 + DEBOUNCE_CAP_S)


def test_speed_alone_waits_for_calm_and_old_news() -> None:
    patience = Patience()
    patience.see("a", 100.0)
    assert at(patience, FASTER) == pytest.approx(100 + NEWS_S)
    patience.switched(105.0)
    assert at(patience, FASTER) == pytest.approx(105 + CALM_S)
    assert at(patience, REPAIR) == pytest.approx(100 + DEBOUNCE_S), "a hole does not wait"


def test_served_layers_are_left_only_when_the_mesh_has_not_answered_for_a_while() -> None:
    patience = Patience()
    patience.see("a", 0.0)
    patience.judge(broken=True, now=100.0)
    patience.judge(broken=True, now=101.0)
    assert at(patience, URGENT, loses=True) == pytest.approx(100 + URGENT_AFTER_S)
    assert at(patience, URGENT) == pytest.approx(DEBOUNCE_S), "it leaves nothing"
    patience.judge(broken=False, now=101.5)
    patience.judge(broken=True, now=102.0)
    assert at(patience, URGENT, loses=True) == pytest.approx(102 + URGENT_AFTER_S)
