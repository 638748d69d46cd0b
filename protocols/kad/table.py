"""Peers that have answered, in buckets by how much of their place they share with ours (Kademlia, section 2.4)."""

from __future__ import annotations

from typing import Final

from protocols.ids import PeerId
from protocols.kad.lookup import K
from protocols.kad.messages import Peer, place_of

BUCKETS: Final = 16  # the last one takes everybody who is that near or nearer; at most 320 peers in all
MAX_FAILURES: Final = 2  # in a row, then a peer is forgotten


class Table:
    """Who is there to ask. Whoever has been there longest stays, unless it fails."""

    def __init__(self, us: PeerId) -> None:
        self._us = us
        self._place = place_of(us)
        self._buckets: list[dict[PeerId, tuple[Peer, int]]] = [{} for _ in range(BUCKETS)]
        self._failures: dict[PeerId, int] = {}  # of peers in the table

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets)

    def answered(self, peer: Peer) -> None:
        """A peer that we dialled at these addresses has answered: it serves the DHT."""
        if peer.id == self._us or not peer.addresses:
            return
        at = place_of(peer.id)
        bucket = self._bucket(at)
        self._failures.pop(peer.id, None)
        if peer.id not in bucket and len(bucket) >= K:
            failing = next((known for known in bucket if known in self._failures), None)
            if failing is None:
                return
            self._forget(failing, bucket)
        bucket[peer.id] = (peer, at)

    def failed(self, peer: PeerId) -> None:
        """A peer did not answer."""
        bucket = self._bucket(place_of(peer))
        if peer in bucket:
            self._failures[peer] = self._failures.get(peer, 0) + 1
            if self._failures[peer] >= MAX_FAILURES:
                self._forget(peer, bucket)

    def nearest(self, target: int, count: int = K) -> tuple[Peer, ...]:
        """The peers nearest to a place, nearest first."""
        known = [entry for bucket in self._buckets for entry in bucket.values()]
        return tuple(peer for peer, at in sorted(known, key=lambda entry: entry[1] ^ target)[:count])

    def _bucket(self, at: int) -> dict[PeerId, tuple[Peer, int]]:
        shared = 256 - (at ^ self._place).bit_length()
        return self._buckets[min(shared, BUCKETS - 1)]

    def _forget(self, peer: PeerId, bucket: dict[PeerId, tuple[Peer, int]]) -> None:
        del bucket[peer]
        self._failures.pop(peer, None)
