"""Who signs our records: the node key, in incarnations that outlive a restart."""

from __future__ import annotations

from typing import Final

from meshnode.core.clock import Wall
from meshnode.services.port import RecordSigner
from meshnode.state.port import Records
from protocols.ids import PeerId

INCARNATION: Final = "incarnation"  # kind of record


def next_incarnation(records: Records, us: PeerId, now_ms: int) -> int:
    """The incarnation of this start of the node: its wall clock, but always above the one before.

    A clock that was set back would otherwise make everybody ignore us: they hold a newer advert of ours.
    """
    before = int.from_bytes(records.record(INCARNATION, us) or b"", "big")
    now = max(now_ms, before + 1)
    records.put_record(INCARNATION, us, now.to_bytes(8, "big"))
    return now


class Author:
    """This node, as the author of its records."""

    def __init__(self, us: PeerId, signer: RecordSigner, records: Records, wall: Wall) -> None:
        self._us = us
        self._signer = signer
        self._records = records
        self._wall = wall

    def sign(self, domain: str, payload: bytes) -> bytes:
        """A signed record (protocols/envelope)."""
        return self._signer.sign(domain, payload)

    def incarnate(self, least: int) -> int:
        """Begin a new incarnation, at least this high."""
        return next_incarnation(self._records, self._us, max(self._wall(), least))
