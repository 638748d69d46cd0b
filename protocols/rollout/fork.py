"""Which adapter counts where several have been accepted: the branch with most votes, then the higher version."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from protocols.ids import Cid, PeerId
from protocols.rollout.count import Counted
from protocols.rollout.weights import total


def chosen_path(among: Mapping[Cid, Counted], weight: Mapping[PeerId, int]) -> tuple[Cid, ...]:
    """From the oldest to the newest of the chosen branch; the last one is what is served.

    A candidate hangs below the one whose adapter it replaces; where that is not among them, it begins a branch. At
    each fork the child goes first for which, with all below it, most weight of voters has voted, then the one that
    leads to the highest version, then the lowest id.
    """
    parent = {cid: _parent(counted, among, weight) for cid, counted in among.items()}
    children: defaultdict[Cid | None, list[Cid]] = defaultdict(list)
    favour = {cid: set(counted.favour) for cid, counted in among.items()}
    highest = {cid: counted.counter for cid, counted in among.items()}
    for cid in sorted(among, key=lambda cid: -among[cid].counter):  # a child counts higher than its parent
        above = parent[cid]
        children[above].append(cid)
        if above is not None:
            favour[above] |= favour[cid]
            highest[above] = max(highest[above], highest[cid])

    def first(cid: Cid) -> tuple[int, int, Cid]:
        return -total(weight, favour[cid]), -highest[cid], cid

    path: list[Cid] = []
    while below := children[path[-1] if path else None]:
        path.append(below[0] if len(below) == 1 else min(below, key=first))
    return tuple(path)


def _parent(child: Counted, among: Mapping[Cid, Counted], weight: Mapping[PeerId, int]) -> Cid | None:
    """The candidate that it replaces; only what counts up can hang below one, so there are no circles."""
    found = [
        cid
        for cid, other in among.items()
        if other.candidate.adapter == child.candidate.previous and other.counter < child.counter
    ]
    return min(found, key=lambda cid: (-total(weight, among[cid].favour), -among[cid].counter, cid), default=None)
