"""Whom a host watches closely: each is watched by somebody, and a large mesh costs a node no more than a small one.

All hosts that are connected stand in a ring, in an order that everybody computes alike; each watches its neighbours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Final

from protocols.ids import PeerId

ALERT_S: Final = 10.0  # after a peer fell silent everybody is watched closely for so long


class Vigil:
    """The watch of one host."""

    def __init__(self, us: PeerId) -> None:
        self._us = us
        self._places: dict[PeerId, bytes] = {us: _place(us)}
        self._alert_until = -math.inf
        self._doubts: dict[PeerId, float] = {}  # peer -> until when

    def alert(self, now: float) -> None:
        """Somebody fell silent; perhaps all have, because our own link is dead."""
        self._alert_until = now + ALERT_S

    def doubt(self, peer: PeerId, now: float) -> None:
        """Somebody else says that a peer fell silent."""
        self._doubts[peer] = now + ALERT_S

    def close(self, peers: Iterable[PeerId], now: float) -> frozenset[PeerId]:
        """Those of the connected peers that are to be watched closely now."""
        peers = frozenset(peers)
        self._doubts = {peer: until for peer, until in self._doubts.items() if until > now}
        if now < self._alert_until or len(peers) <= 2:
            return peers
        for peer in self._places.keys() - peers - {self._us}:
            del self._places[peer]
        for peer in peers - self._places.keys():
            self._places[peer] = _place(peer)
        ring = sorted(self._places, key=self._places.__getitem__)
        at = ring.index(self._us)
        return frozenset((ring[at - 1], ring[(at + 1) % len(ring)], *(self._doubts.keys() & peers)))


def _place(peer: PeerId) -> bytes:
    return hashlib.sha256(peer.encode("ascii")).digest()
