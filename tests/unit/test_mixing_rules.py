"""How adapters are mixed, and what hostile ones can do: arithmetic, on small vectors."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from meshnode.policy import gate
from meshnode.policy.mixing import (
    ELASTICITY,
    Outer,
    Theirs,
    added,
    adopted,
    averaged,
    elastic,
    outer_step,
    staleness_weight,
)
from meshnode.policy.reputation import BAN_S, Reputation
from meshnode.policy.robust import cap_of, clip_radius, clipped_sum, distance, hostile_weight
from protocols.delta.codec import pack_delta
from protocols.delta.frame import Vector
from protocols.delta.messages import Codec
from tests.conftest import SEED


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def several(count: int, size: int = 500) -> list[Vector]:
    chance = np.random.default_rng(SEED)
    return [chance.normal(size=size).astype(np.float32) for _ in range(count)]


def test_a_pair_keeps_its_sum_although_both_send_few_bits() -> None:
    """What one side gains the other loses: only then does rounding move no mean."""
    one, other = several(2)
    sent = [pack_delta(Codec.INT4, v).sent for v in (one, other)]
    mixed_one = averaged(one, sent[0], [Theirs(sent[1], 0.5)])
    mixed_other = averaged(other, sent[1], [Theirs(sent[0], 0.5)])
    assert mixed_one + mixed_other == pytest.approx(one + other, abs=1e-5)
    gap = np.linalg.norm(mixed_one - mixed_other) / np.linalg.norm(one - other)
    assert gap < 0.12, "what is left is the rounding"


def test_weights() -> None:
    assert averaged(vector(0, 0), vector(0, 0), [Theirs(vector(4, 8), 0.25)]).tolist() == [1, 2]
    assert averaged(vector(1), vector(0), [Theirs(vector(4), 0.5)]).tolist() == [3]
    assert elastic(vector(0), vector(0), [Theirs(vector(4), 0.5)]).tolist() == [2 * ELASTICITY]
    assert [round(staleness_weight(age), 3) for age in (0, 1, 3)] == [1.0, 0.707, 0.5]


def test_the_outer_step_is_that_of_noloco() -> None:
    """m <- b m + eta mean(theta - phi) + eta (mean(phi) - phi_i), written out for a pair."""
    phi, theta, before = several(2), several(4)[2:], several(5)[4]
    eta, b = 0.7, 0.3
    mean = (theta[0] + theta[1]) / 2
    m = b * before + eta * ((theta[0] - phi[0]) + (theta[1] - phi[1])) / 2 + eta * ((phi[0] + phi[1]) / 2 - phi[0])
    stepped = outer_step(Outer(phi[0], before), mean)
    assert stepped.momentum == pytest.approx(m, abs=1e-5)
    assert stepped.slow == pytest.approx(phi[0] + m, abs=1e-5)
    assert not Outer.start(phi[0]).momentum.any()


def test_changes_add_up_in_any_order() -> None:
    changes = several(20)
    assert added(changes[0], changes) == pytest.approx(added(changes[0], changes[::-1]), abs=1e-6)


def test_a_minority_does_not_decide_where_newcomers_start() -> None:
    assert adopted([vector(1, 2), vector(1.1, 2.2), vector(900, -900)]).tolist() == pytest.approx([1.1, 2.0])


def test_what_is_plausible() -> None:
    assert cap_of([], []) == inf
    assert cap_of([], [1.0, 2.0]) == inf
    assert cap_of([], [1.0, 2.0, 900.0]) == 6.0
    assert cap_of([1.0] * 4, [900.0] * 5) == 3.0
    assert cap_of([900.0] * 100 + [1.0] * 64, []) == 3.0
    assert distance(vector(0, 3), vector(4, 0)) == 5.0


def test_the_clip_radius_is_the_reference_s() -> None:
    """n = 7 with equal weights: all above the (n - 2b)-th smallest distance, ours counted, is clipped."""
    weights = [1 / 7] * 6
    distances = [6.0, 1.0, 5.0, 2.0, 4.0, 3.0]
    assert clip_radius(distances, weights, 0) == inf
    assert clip_radius(distances, weights, 1 / 7) == 4.0  # the fifth of 0, 1, 2, 3, 4, 5, 6
    assert clip_radius(distances, weights, 2 / 7) == 2.0
    assert clip_radius(distances, weights, 3 / 7) == 0.0
    assert clip_radius([1.0], [0.5], 0.3) == 0.0, "more may be hostile than we are"


def test_who_may_be_hostile() -> None:
    def weight_of(count: int) -> float:
        return hostile_weight([Theirs(vector(0), 1 / (count + 1))] * count)

    assert [round(weight_of(n) * (n + 1)) for n in (0, 1, 4, 5, 8, 9, 13, 15)] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert hostile_weight([Theirs(vector(0), w) for w in (0.1, 0.3, 0.1, 0.1, 0.1)]) == 0.3


def test_hostile_neighbours_move_us_no_further_than_honest_ones_might() -> None:
    honest = [v * 0.01 for v in several(5)]
    far = [np.full(500, 1e6, np.float32)] * 2
    theirs = [Theirs(v, 1 / 8) for v in (*honest[1:], *far, honest[1])]
    mixed = clipped_sum(honest[0], honest[0], theirs, 2 / 8)
    assert distance(mixed, honest[0]) <= max(distance(v, honest[0]) for v in honest)
    plain = averaged(honest[0], honest[0], theirs)
    assert distance(plain, honest[0]) > 1e5
    assert clipped_sum(honest[0], honest[0], theirs, 0) == pytest.approx(plain)


def test_the_gate() -> None:
    labels = ("a", "a", "b", "b", "c")
    own = (1.0, 3.0, 9.0, 7.0, 5.0)

    def judged(*mix: float) -> gate.Verdict:
        return gate.judge(labels, own, mix)

    assert judged(*own).passes, "nothing is taken"
    assert judged(2.0, 4.0, 8.0, 7.5, 5.0).given == 0.25
    meeting = judged(3.0, 5.0, 5.0, 6.0, 5.0)
    assert (meeting.taken, meeting.given, meeting.classes) == (2.0, 2.5, 3)
    assert meeting.passes
    assert not judged(3.0, 5.0, 9.0, 7.0, 5.0).passes, "it takes and gives nothing"
    assert not judged(3.0, 5.0, 8.0, 6.0, 5.0).passes, "half is given back"
    assert judged(1.1, 3.1, 9.0, 7.0, 5.0).passes, "chance"
    assert not judged(1.0, 3.0, 9.0, 7.0, nan).passes
    assert not judged(1.0, 3.0, 9.0, 7.0, inf).passes


def test_wrong_labels_are_seen_class_by_class() -> None:
    """The mean over all samples falls, for most of them are of classes that we know nothing of."""
    labels = ["ours"] * 2 + ["other"] * 30
    own, mix = [0.1] * 2 + [9.0] * 30, [4.0] * 2 + [8.5] * 30
    assert sum(mix) < sum(own)
    assert not gate.judge(labels, own, mix).passes


def test_samples_are_drawn_by_what_they_judge() -> None:
    labels = ["rare"] * 20 + ["usual"] * 980
    drawn = gate.draw(labels, "bafy", 3)
    assert len(set(drawn)) == gate.DRAWN
    assert list(drawn) == sorted(drawn)
    assert drawn == gate.draw(labels, "bafy", 3)
    assert drawn != gate.draw(labels, "bafy", 4) != gate.draw(labels, "bafz", 4)
    assert sum(index < 20 for index in drawn) == 20, "classes take turns"
    assert sum(index < 20 for index in gate.draw(labels, "bafy", 3, 10)) == 5
    assert gate.draw(labels[:5], "bafy", 3) == (0, 1, 2, 3, 4)


def test_reputation_falls_and_comes_back() -> None:
    peer = Reputation()
    assert peer.trusted(0.0)
    for _ in range(3):
        peer = peer.after(used=False)
    assert peer.trusted(0.0)
    for _ in range(4):
        peer = peer.after(used=False)
    assert not peer.trusted(0.0)
    for _ in range(60):
        peer = peer.faded()
    assert peer.trusted(0.0)
    saint = Reputation()
    for _ in range(1000):
        saint = saint.after(used=True).faded()
    assert saint.good < 60, "good deeds are not kept for a bad day"
    liar = saint.proved(100.0)
    assert not liar.trusted(100.0 + BAN_S - 1)
    assert liar.trusted(100.0 + BAN_S)
