"""Nodes of which some lie: good adapters arrive everywhere, bad ones nowhere; after a split one is left."""

from __future__ import annotations

from collections import Counter

import pytest

from meshnode.sim.rollout import MOST, Truth, World, candidate, roll_out

SEEDS = (1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_good_adapter_reaches_everybody(seed: int) -> None:
    outcome = roll_out(Truth(delta=-0.02), nodes=200, liars=40, seed=seed)
    print(outcome)
    assert outcome.is_right and outcome.released == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_adapter_is_revoked_everywhere_within_three_epochs(seed: int) -> None:
    outcome = roll_out(Truth(delta=0.05), nodes=200, liars=40, seed=seed)
    print(outcome)
    assert outcome.is_right and outcome.revoked == 1.0 and outcome.epochs < 3


def test_it_stays_with_the_first_when_honest_voters_are_slow() -> None:
    """The liars' votes are all there is when the first nodes begin to use it."""
    outcome = roll_out(Truth(delta=0.05), nodes=200, liars=60, seed=3, slowest=8)
    print(outcome)
    assert 0 < outcome.most <= MOST and outcome.used == 0.0 and outcome.revoked == 1.0


@pytest.mark.parametrize("delta", [-0.01, 0.01])
def test_small_differences_are_decided_rightly_beside_thirty_percent_of_liars(delta: float) -> None:
    outcome = roll_out(Truth(delta=delta), nodes=100, liars=30, seed=4)
    print(outcome)
    assert outcome.is_right


def test_what_the_suite_does_not_show_is_seen_in_use() -> None:
    outcome = roll_out(Truth(delta=-0.02, wrong=0.3), nodes=100, liars=20, seed=5)
    print(outcome)
    assert outcome.used == 0.0 and outcome.released == 0.0 and outcome.most <= 0.3


def test_after_a_split_one_release_is_left() -> None:
    world = World(nodes=50, liars=5, seed=6)
    honest = [number for number, member in enumerate(world.members) if not member.lies]
    for number, member in enumerate(world.members):
        member.side = number % 5 > 1
    left, right = (next(n for n in honest if world.members[n].side == side) for side in (0, 1))
    ours, theirs = candidate("ours", 1), candidate("theirs", 1)
    world.propose(left, ours, Truth(delta=-0.02))
    world.propose(right, theirs, Truth(delta=-0.02))
    world.run(8, lambda: world.released(ours) + world.released(theirs) == 1.0)
    apart = Counter(member.machine.head for member in world.members)
    assert apart == {ours: 20, theirs: 30}
    for member in world.members:
        member.side = 0
    took = world.run(12, lambda: world.released(theirs) == 1.0)
    print(f"one release again after {took:g} epochs")
    assert world.released(theirs) == 1.0


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [roll_out(Truth(delta=-0.02), nodes=30, liars=6, seed=7) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != roll_out(Truth(delta=-0.02), nodes=30, liars=6, seed=8)
