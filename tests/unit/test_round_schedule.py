"""Who exchanges with whom: exact means, the same for everybody, nobody twice in one exchange."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from protocols.cohort.cohorts import cohorts_of
from protocols.round.schedule import HALF, Mode, Partner, Readings, cycle_of, order_of, pairs_for, sites_of
from tests.conftest import SEED


def names(count: int) -> tuple[str, ...]:
    return tuple(f"peer-{i:03}" for i in range(count))


def after(cycle: tuple[Readings, ...], values: dict[str, Fraction]) -> dict[str, Fraction]:
    """Exact arithmetic: every participant in every exchange."""
    for readings in cycle:
        values = {
            me: value + sum((p.weight * (values[p.peer] - value) for p in readings.get(me, ())), Fraction(0))
            for me, value in values.items()
        }
    return values


def exact(mode: Mode, count: int, *, group: int = 8, sites: tuple[tuple[str, ...], ...] = ()) -> bool:
    order = order_of(names(count), "lineage", 3)
    values = {name: Fraction(i * i) for i, name in enumerate(names(count))}
    mean = sum(values.values(), Fraction(0)) / count
    return set(after(cycle_of(mode, order, group=group, sites=sites), values).values()) == {mean}


@pytest.mark.parametrize("count", range(2, 66))
def test_a_cycle_of_pairs_gives_everybody_the_mean(count: int) -> None:
    assert exact(Mode.PAIRWISE, count)


@pytest.mark.parametrize(("count", "exchanges"), [(2, 1), (4, 2), (16, 4), (32, 5), (64, 6)])
def test_powers_of_two_take_the_logarithm(count: int, exchanges: int) -> None:
    """E3.1: exact in log2 n."""
    assert len(pairs_for(count)) == exchanges


def test_other_numbers_take_at_most_twice_that_and_one() -> None:
    """Takezawa et al., theorem 1: 2 log2 n + 2 at most. 6 = 2 x 3 takes four instead of five."""
    for count in range(2, 200):
        assert len(pairs_for(count)) <= 2 * np.log2(count) + 2
    assert len(pairs_for(6)) == 4
    assert len(pairs_for(25)) == 9
    assert pairs_for(1) == ()


@pytest.mark.parametrize("count", [2, 5, 7, 12, 25, 33])
def test_pairs_are_disjoint(count: int) -> None:
    for exchange in pairs_for(count):
        members = Counter(member for pair in exchange for member in (pair.one, pair.other))
        assert set(members.values()) <= {1}
        assert all(0 <= member < count for member in members)
        assert all(HALF <= pair.weight < 1 for pair in exchange)


def test_a_group_averages_at_once() -> None:
    assert len(cycle_of(Mode.GROUP, names(8), group=8, sites=())) == 1
    assert exact(Mode.GROUP, 8)
    assert exact(Mode.GROUP, 5)


def test_a_grid_of_groups_is_exact_when_it_is_full() -> None:
    assert len(cycle_of(Mode.GROUP, names(64), group=8, sites=())) == 2
    assert exact(Mode.GROUP, 64, group=8)
    assert exact(Mode.GROUP, 27, group=3)
    assert not exact(Mode.GROUP, 11, group=4)


def test_a_grid_gets_close_although_a_tenth_is_lost_each_time() -> None:
    """E3.1: 8 x 8, variance at most a thousandth after five exchanges, in the middle of 21 runs."""
    chance = np.random.default_rng(SEED)
    left = []
    for _ in range(21):
        values = chance.normal(size=64)
        start = values.var()
        for step in range(5):
            order = order_of(names(64), "lineage", step // 2)
            readings = cycle_of(Mode.GROUP, order, group=8, sites=())[step % 2]
            lost = set(chance.choice(names(64), 6, replace=False))
            now = dict(zip(names(64), values, strict=True))
            for i, me in enumerate(names(64)):
                present = [now[p.peer] for p in readings[me] if p.peer not in lost]
                if me not in lost:
                    values[i] = np.mean([now[me], *present])
        left.append(values.var() / start)
    assert np.median(left) <= 1e-3, f"seed {SEED}"


@pytest.mark.parametrize("sizes", [(4,), (4, 4), (3, 2), (5, 2, 1), (1, 1, 1, 1, 1), (6, 3, 3, 2, 1)])
def test_sites_agree_inside_and_then_among_each_other(sizes: tuple[int, ...]) -> None:
    left, sites = list(names(sum(sizes))), []
    for size in sizes:
        sites.append(tuple(left[:size]))
        left = left[size:]
    assert exact(Mode.HIERARCHICAL, sum(sizes), sites=tuple(sites))
    crossings = 0
    for readings in cycle_of(Mode.HIERARCHICAL, names(sum(sizes)), group=8, sites=sites):
        crossing = {me for me, (p,) in readings.items() if not any(me in s and p.peer in s for s in sites)}
        crossings += bool(crossing)
    assert crossings == int(np.ceil(np.log2(len(sizes))))


def test_sites_come_from_round_trips() -> None:
    trips = {("a", "b"): 400, ("b", "c"): 9_000, ("c", "d"): 40_000, ("d", "x"): 100, ("e", "d"): 10_000}
    assert sites_of("abcdef", trips) == (("a", "b", "c"), ("d", "e"), ("f",))
    assert sites_of("", trips) == ()


def test_the_order_is_drawn_anew_and_the_same_for_all() -> None:
    assert order_of(names(9), "one", 1) == order_of(names(9)[::-1], "one", 1)
    assert order_of(names(9), "one", 1) != order_of(names(9), "one", 2)
    assert order_of(names(9), "one", 1) != order_of(names(9), "two", 1)


def test_broadcast_takes_everybody() -> None:
    (readings,) = cycle_of(Mode.BROADCAST, ("a", "b", "c"), group=2, sites=())
    assert readings["b"] == (Partner("a", Fraction(1, 3)), Partner("c", Fraction(1, 3)))
    assert cycle_of(Mode.PAIRWISE, ("a",), group=2, sites=()) == ()


@pytest.mark.parametrize("count", [9, 16, 21, 50])
def test_cohorts_give_each_other_their_means(count: int) -> None:
    """By then all of a cohort have one mean; after one exchange all have that of everybody."""
    assert cycle_of(Mode.MASKED, names(8), group=8, sites=()) == ()
    (readings,) = cycle_of(Mode.MASKED, names(count), group=8, sites=())
    means = {}
    for cohort in cohorts_of(names(count)):
        for name in cohort:
            means[name] = Fraction(sum(names(count).index(one) for one in cohort), len(cohort))
    for name, partners in readings.items():
        mixed = means[name] + sum(p.weight * (means[p.peer] - means[name]) for p in partners)
        assert mixed == Fraction(count - 1, 2)
