"""Which deltas are in which: the history of one frame as a Merkle DAG of signed records. SPEC.md, section Behaviour.

A record names its parents by the hashes of their records, so its own hash covers everything that led to it. A
state-based CRDT: the same records give the same lineage, in whatever order they come. Bounded: the oldest positions
are forgotten first, and a parent that is not known is a root.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from protocols.delta.messages import DeltaRecord, Equivocation, Position, contradiction, name_of, record_cid
from protocols.ids import Cid, PeerId

MAX_ENTRIES: Final = 4096  # 64 peers for 64 rounds
KEPT_RECORDS: Final = 16  # of one signer, to compare later ones with: as far back as two records can contradict


@dataclass(frozen=True, slots=True)
class Entry:
    """One delta."""

    cid: Cid  # of the signed record
    delta: Cid  # of the file
    peer: PeerId
    position: Position
    parents: tuple[Cid, ...]

    @property
    def order(self) -> tuple[Position, Cid]:
        """Oldest first, the same on every node."""
        return self.position, self.cid


class Lineage:
    """The deltas of one frame, and who contradicted themselves."""

    def __init__(self, frame: Cid) -> None:
        self._frame = frame
        self._entries: dict[Cid, Entry] = {}
        self._records: dict[PeerId, dict[Cid, tuple[bytes, DeltaRecord]]] = {}  # the newest ones of each signer
        self._proofs: dict[PeerId, Equivocation] = {}

    def add(self, data: bytes, record: DeltaRecord) -> Equivocation | None:
        """Take a signed record and what `open_delta` read in it; those of other frames are left alone.

        Returns the proof that the signer made two deltas for one position, if this record completes the first one.
        """
        cid = record_cid(data)
        if record.frame_cid != self._frame or cid in self._entries:
            return None
        peer = PeerId(record.peer)
        parents = tuple(map(name_of, record.parents))
        self._entries[cid] = Entry(cid, record.made.name, peer, record.position, parents)
        if len(self._entries) > MAX_ENTRIES:
            del self._entries[min(self._entries.values(), key=lambda entry: entry.order).cid]
        return self._compare(peer, cid, data, record)

    def _compare(self, peer: PeerId, cid: Cid, data: bytes, record: DeltaRecord) -> Equivocation | None:
        if peer in self._proofs:
            return None
        kept = self._records.setdefault(peer, {})
        for other_data, other in kept.values():
            if contradiction(other, record) is not None:
                proof = Equivocation(first=min(data, other_data), second=max(data, other_data))
                self.convict(peer, proof)
                return proof
        kept[cid] = data, record
        if len(kept) > KEPT_RECORDS:
            del kept[min(kept, key=lambda one: (kept[one][1].position, one))]
        return None

    def convict(self, peer: PeerId, proof: Equivocation) -> bool:
        """Take a proof that somebody else has found, and that holds. False: this signer was caught before."""
        if peer in self._proofs:
            return False
        self._proofs[peer] = proof
        self._records.pop(peer, None)
        return True

    def get(self, cid: Cid) -> Entry | None:
        return self._entries.get(cid)

    @property
    def proofs(self) -> Mapping[PeerId, Equivocation]:
        """Who made two deltas for one position, and what shows it."""
        return self._proofs

    @property
    def heads(self) -> tuple[Entry, ...]:
        """Deltas that are in no other, newest first."""
        inside = {parent for entry in self._entries.values() for parent in entry.parents}
        heads = [entry for cid, entry in self._entries.items() if cid not in inside]
        return tuple(sorted(heads, key=lambda entry: entry.order, reverse=True))

    def ancestors(self, cid: Cid) -> frozenset[Cid]:
        """Everything that went into this delta, itself included, as far as it is known by name."""
        parents = {one: entry.parents for one, entry in self._entries.items()}
        return _reached(cid, parents)

    def influence(self, cid: Cid) -> tuple[Entry, ...]:
        """Known deltas that this one went into, itself included, oldest first: what taking it back concerns."""
        children: dict[Cid, tuple[Cid, ...]] = {}
        for entry in self._entries.values():
            for parent in entry.parents:
                children[parent] = (*children.get(parent, ()), entry.cid)
        return self._in_order(_reached(cid, children))

    def lacks(self, have: Iterable[Cid], wanted: Cid) -> tuple[Entry, ...]:
        """What a peer that has `have`, and all that is in those, needs for `wanted`, oldest first."""
        held: set[Cid] = set()
        for cid in have:
            held |= self.ancestors(cid)
        return self._in_order(self.ancestors(wanted) - held)

    def _in_order(self, cids: Iterable[Cid]) -> tuple[Entry, ...]:
        return tuple(sorted((self._entries[c] for c in cids if c in self._entries), key=lambda entry: entry.order))


def _reached(start: Cid, edges: Mapping[Cid, tuple[Cid, ...]]) -> frozenset[Cid]:
    found: set[Cid] = set()
    left = [start]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left.extend(edges.get(one, ()))
    return frozenset(found)
