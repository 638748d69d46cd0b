"""Copies of files in a mesh: who makes the missing ones, and which may be evicted. Pure functions.

Everybody ranks the nodes for a file by a hash of both (rendezvous hashing; Thaler and Ravishankar 1998), so that
nodes with the same view agree without a word, and a node that comes or goes changes few ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import islice

from protocols.ids import PeerId


@dataclass(frozen=True, slots=True)
class Shelf:
    """What one live node holds and could still take. A node that is leaving has none: it takes its copies away."""

    peer: PeerId
    files: frozenset[bytes]  # binary CIDs
    room_bytes: int
    steady: bool = True  # not on battery


class Standing(Enum):
    """What a copy of ours means to the mesh."""

    FREE = "free"  # enough others keep the file
    SPARE = "spare"  # one of the wanted copies, though others hold it
    LAST = "last"  # nobody else is sure to keep it


def ranked(cid: bytes, peers: Collection[PeerId]) -> list[PeerId]:
    """Peers in the order in which they keep this file."""
    return sorted(peers, key=lambda peer: hashlib.sha256(cid + peer.encode()).digest())


@lru_cache(maxsize=4096)
def _ranking(cid: bytes, peers: frozenset[PeerId]) -> list[PeerId]:
    """The same, remembered: a plan is made every second, of nodes that seldom change."""
    return ranked(cid, peers)


def standing(cid: bytes, us: PeerId, others: Collection[PeerId], replicas: int) -> Standing:
    """What our copy means when `others` hold the file too.

    A node gives a copy up only for holders that rank before it. The first in rank never does, so however many
    evict at the same moment, one copy stays as long as their views name living holders.
    """
    before = ranked(cid, (*others, us)).index(us)
    if before >= replicas:
        return Standing.FREE
    return Standing.SPARE if before else Standing.LAST


def copies(files: Collection[bytes], shelves: Sequence[Shelf]) -> dict[bytes, int]:
    """How many nodes hold each of these files."""
    out = dict.fromkeys(files, 0)
    wanted = frozenset(files)
    for shelf in shelves:
        for cid in shelf.files & wanted:
            out[cid] += 1
    return out


def assignments(
    files: Mapping[bytes, int],
    shelves: Sequence[Shelf],
    replicas: int,
    late: Mapping[bytes, int] | None = None,
) -> dict[PeerId, list[bytes]]:
    """Which node fetches which file, rarest first, so that every file gets its copies.

    Args:
      files: binary CID -> bytes.
      late: file -> how many nodes have not done their part in time; as many more are asked.

    A file that no node has room for is assigned to nobody.
    """
    everybody = frozenset(shelf.peer for shelf in shelves)
    shelf_of = {shelf.peer: shelf for shelf in shelves}
    room = {shelf.peer: shelf.room_bytes for shelf in shelves}
    held = copies(files, shelves)
    plan: dict[PeerId, list[bytes]] = {}
    for cid in sorted(files, key=lambda cid: (held[cid], cid)):
        missing = min(replicas, len(shelves)) - held[cid]
        if missing <= 0:
            break  # nor do those that follow lack any
        missing += (late or {}).get(cid, 0)
        order = _ranking(cid, everybody)
        able = (
            peer
            for steady in (True, False)
            for peer in order
            if shelf_of[peer].steady is steady and cid not in shelf_of[peer].files and room[peer] >= files[cid]
        )
        for peer in islice(able, missing):
            room[peer] -= files[cid]
            plan.setdefault(peer, []).append(cid)
    return plan
