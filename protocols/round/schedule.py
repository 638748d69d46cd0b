"""Who exchanges with whom, computed by everybody alone from the same list of participants. SPEC.md, Behaviour.

A schedule is a cycle of exchanges, each a set of disjoint pairs with a weight w: both sides do
x <- x + w (theirs - x). At its end all have the exact mean:

- n a power of two: log2 n hypercube exchanges with w = 1/2 (one-peer exponential graph, Ying et al., NeurIPS 2021);
- any n: the Base-2 graph (Takezawa et al., "Beyond Exponential Graph", NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from hashlib import sha256
from typing import Final

from protocols.cohort.cohorts import cohorts_of

HALF: Final = Fraction(1, 2)
SITE_US: Final = 10_000  # peers whose round trip is at most this are on one site: a local network, not the Internet


class Mode(Enum):
    """How adapters come together. All but BROADCAST mix whole adapters."""

    PAIRWISE = "pairwise"  # pairs by the Base-2 graph
    NOLOCO = "noloco"  # the same pairs, with an outer step with momentum
    ELASTIC = "elastic"  # the same pairs pull at each other, and stay apart
    GROUP = "group"  # all of a small group with all: a synchronous all-reduce
    HIERARCHICAL = "hierarchical"  # pairs within a site, then pairs across sites
    BROADCAST = "broadcast"  # everybody adds everybody's changes
    MASKED = "masked"  # means of cohorts (protocols/cohort), all with all


@dataclass(frozen=True, slots=True)
class Pair:
    """Positions of two participants in their common order, and the weight of the other's adapter."""

    one: int
    other: int
    weight: Fraction


Exchange = tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Partner:
    peer: str
    weight: Fraction


def order_of(participants: Collection[str], lineage: str, cycle: int) -> tuple[str, ...]:
    """The participants in an order that nobody chose, anew for each cycle."""
    return tuple(
        sorted(participants, key=lambda peer: sha256(f"meshnode/round/1:{lineage}:{cycle}:{peer}".encode()).digest())
    )


@lru_cache(256)
def pairs_for(count: int) -> tuple[Exchange, ...]:
    """The shorter of the two constructions below; no exchange at all for one participant."""
    simple = _simple(tuple(range(count)))
    factored = _factored(count)
    return factored if len(factored) < len(simple) else simple


def _hypercube(nodes: Sequence[int]) -> tuple[Exchange, ...]:
    """Exact mean of 2^k nodes in k exchanges."""
    steps = len(nodes).bit_length() - 1
    return tuple(
        tuple(Pair(nodes[i], nodes[i ^ 1 << k], HALF) for i in range(len(nodes)) if not i >> k & 1)
        for k in range(steps)
    )


def _simple(nodes: Sequence[int]) -> tuple[Exchange, ...]:
    """Simple Base-2 graph: parts of 2^p1 > 2^p2 > ... nodes take their means; then each part in turn meets all later
    ones, which leaves it with the right sum, and takes its mean again."""
    parts: list[Sequence[int]] = []
    start = 0
    for power in reversed(range(len(nodes).bit_length())):
        if len(nodes) >> power & 1:
            parts.append(nodes[start : start + (1 << power)])
            start += 1 << power
    lead = len(parts[0]).bit_length() - 1 if parts else 0
    exchanges: dict[int, list[Pair]] = {}
    for index, part in enumerate(parts):
        inner = _hypercube(part)
        for step, exchange in enumerate(inner):
            exchanges.setdefault(step, []).extend(exchange)
            if len(parts) > 1:
                exchanges.setdefault(lead + index + 1 + step, []).extend(exchange)
        later = [node for other in parts[index + 1 :] for node in other]
        weight = Fraction(len(part), len(part) + len(later))
        for one, other in zip(part, later, strict=False):
            exchanges.setdefault(lead + index, []).append(Pair(one, other, weight))
    return tuple(tuple(exchanges[step]) for step in sorted(exchanges))


def _factored(count: int) -> tuple[Exchange, ...]:
    """count = 2^k q: the simple graph within each of 2^k groups of q, then hypercubes across them."""
    groups = count & -count
    size = count // groups
    within: list[Exchange] = []
    for exchange in _simple(tuple(range(size))):
        within.append(
            tuple(Pair(p.one + g * size, p.other + g * size, p.weight) for g in range(groups) for p in exchange)
        )
    across = [_hypercube([g * size + i for g in range(groups)]) for i in range(size)]
    return (*within, *(tuple(p for cube in across for p in cube[k]) for k in range(groups.bit_length() - 1)))


# ---------------------------------------------------------------- the cycle of each mode

Readings = Mapping[str, tuple[Partner, ...]]  # whose adapters each participant takes in one exchange


def cycle_of(
    mode: Mode, order: Sequence[str], *, group: int, sites: Sequence[Collection[str]]
) -> tuple[Readings, ...]:
    """The exchanges after which all have the mean, or come nearest to it, in this mode.

    Args:
      order: of the participants, as `order_of` gives it.
      group: most members of a group of the mode GROUP, 2 or more.
      sites: who is on one local network, as `sites_of` gives it; of use to HIERARCHICAL alone.
    """
    if len(order) < 2:
        return ()
    match mode:
        case Mode.BROADCAST:
            return (_all_with_all((order,)),)
        case Mode.GROUP:
            return _grid(order, group)
        case Mode.HIERARCHICAL:
            return _by_sites(order, sites)
        case Mode.MASKED:
            return _between_cohorts(order)
        case Mode.PAIRWISE | Mode.NOLOCO | Mode.ELASTIC:
            return tuple(_paired(order, exchange) for exchange in pairs_for(len(order)))


def sites_of(
    participants: Collection[str], round_trips_us: Mapping[tuple[str, str], int]
) -> tuple[tuple[str, ...], ...]:
    """Who is on one local network: peers that measured a short round trip to each other, and theirs in turn.

    Sorted, so the same measurements give the same sites everywhere.
    """
    site = {peer: peer for peer in participants}

    def first(peer: str) -> str:
        while site[peer] != peer:
            peer = site[peer]
        return peer

    for (one, other), us in sorted(round_trips_us.items()):
        if us <= SITE_US and one in site and other in site:
            low, high = sorted((first(one), first(other)))
            site[high] = low
    members: dict[str, list[str]] = {}
    for peer in sorted(participants):
        members.setdefault(first(peer), []).append(peer)
    return tuple(tuple(peers) for _, peers in sorted(members.items()))


def _paired(order: Sequence[str], exchange: Exchange) -> Readings:
    readings = {}
    for pair in exchange:
        readings[order[pair.one]] = (Partner(order[pair.other], pair.weight),)
        readings[order[pair.other]] = (Partner(order[pair.one], pair.weight),)
    return readings


def _all_with_all(groups: Sequence[Sequence[str]]) -> Readings:
    readings: dict[str, tuple[Partner, ...]] = {}
    for members in groups:
        weight = Fraction(1, len(members))
        partners = [Partner(peer, weight) for peer in members]
        readings |= {me: (*partners[:i], *partners[i + 1 :]) for i, me in enumerate(members)}
    return readings


def _grid(order: Sequence[str], group: int) -> tuple[Readings, ...]:
    """A grid with sides of at most `group`; each exchange is along another side (Moshpit SGD, NeurIPS 2021)."""
    sides = 1
    while group**sides < len(order):
        sides += 1
    side = min(group, len(order))
    exchanges = []
    for k in range(sides):
        lines: dict[int, list[str]] = {}
        for place, peer in enumerate(order):
            lines.setdefault(place - place // side**k % side * side**k, []).append(peer)
        exchanges.append(_all_with_all(list(lines.values())))
    return tuple(exchanges)


def _between_cohorts(order: Sequence[str]) -> tuple[Readings, ...]:
    """By then all of a cohort have the same mean, so one member of each other cohort speaks for all of it."""
    cohorts = cohorts_of(order)
    if len(cohorts) < 2:
        return ()
    return (
        {
            me: tuple(
                Partner(other[i % len(other)], Fraction(len(other), len(order)))
                for other in cohorts
                if other is not members
            )
            for members in cohorts
            for i, me in enumerate(members)
        },
    )


def _by_sites(order: Sequence[str], sites: Sequence[Collection[str]]) -> tuple[Readings, ...]:
    """The Base-2 graph in each site; then sites unite two at a time. By then all of a site have the same adapter, so
    whoever is asked in the other site speaks for all of it, with the weight of its members."""
    groups = [[peer for peer in order if peer in site] for site in sites]
    groups = sorted(
        (members for members in groups if members), key=lambda members: (-len(members), order.index(members[0]))
    )
    inside = [[_paired(members, exchange) for exchange in pairs_for(len(members))] for members in groups]
    exchanges: list[Readings] = [
        {me: partners for steps in inside if k < len(steps) for me, partners in steps[k].items()}
        for k in range(max(len(steps) for steps in inside))
    ]
    while len(groups) > 1:
        readings: dict[str, tuple[Partner, ...]] = {}
        for one, other in zip(groups[::2], groups[1::2], strict=False):
            for mine, theirs in ((one, other), (other, one)):
                weight = Fraction(len(theirs), len(mine) + len(theirs))
                readings |= {me: (Partner(theirs[i % len(theirs)], weight),) for i, me in enumerate(mine)}
        exchanges.append(readings)
        united = [one + other for one, other in zip(groups[::2], groups[1::2], strict=False)]
        groups = united + (groups[-1:] if len(groups) % 2 else [])
    return tuple(exchanges)
