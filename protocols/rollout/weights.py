"""How much the word of each voter counts: one each, but no branch of the network more than a quarter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from protocols.ids import PeerId

ONE: Final = 1_000_000  # the weight of a voter whose branch is not capped
MOST: Final = 4  # a branch has at most this part of all weight, where there are as many branches


def weights(branches: Mapping[PeerId, PeerId]) -> dict[PeerId, int]:
    """The weight of each voter, by the branch that it belongs to.

    Members whom one inviter let in are one branch with it: whoever may invite could else outvote everybody with
    devices that it makes up. With fewer than four branches all count the same.
    """
    sizes = Counter(branches.values())
    cap = _cap(sorted(sizes.values(), reverse=True))
    return {voter: min(ONE, cap // sizes[branch]) for voter, branch in branches.items()}


def _cap(sizes: list[int]) -> int:
    """The most that a branch may weigh. `sizes`: voters of each branch, descending.

    With k capped branches of weight c beside others that weigh r together, c = (r + k c) / MOST.
    """
    if len(sizes) <= MOST:
        return ONE * min(sizes, default=1)
    caps = (ONE * sum(sizes[capped:]) // (MOST - capped) for capped in range(MOST))
    return next(cap for capped, cap in enumerate(caps) if sizes[capped] * ONE <= cap)  # the last one always holds


def total(weight: Mapping[PeerId, int], voters: Iterable[PeerId]) -> int:
    """Of these voters together; who is no voter counts nothing."""
    return sum(weight.get(voter, 0) for voter in voters)


def upper_median(weighted: Iterable[tuple[int, int]]) -> int:
    """Of pairs (value, weight): the lowest value that, with all below it, has more than half of the weight."""
    ordered = sorted(weighted)
    half, below = sum(weight for _, weight in ordered), 0
    for value, weight in ordered:
        below += weight
        if below * 2 > half:
            return value
    raise ValueError("nothing has no median")
