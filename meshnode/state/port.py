"""What services see of the small durable state of a node. Every call is blocking and short.

Implemented by `database.py` (a file) and `memory_state.py`. One conformance suite
(`tests/conformance/check_state.py`) runs on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from meshnode.membership.port import Ledger
from protocols.ids import PeerId

MAX_ADDRESSES: Final = 8  # kept per peer, last seen first
MAX_PEERS: Final = 256  # kept, last seen first


class Records(Protocol):
    """Records that outlive a restart: one per (kind, signer)."""

    def put_record(self, kind: str, signer: str, data: bytes) -> None:
        """Takes the place of the one before."""

    def record(self, kind: str, signer: str) -> bytes | None: ...

    def records(self, kind: str) -> dict[str, bytes]:
        """Data by signer, ordered by signer."""

    def remove_record(self, kind: str, signer: str) -> None: ...


class Peers(Protocol):
    """Where peers were met."""

    def remember_peer(self, peer: PeerId, addresses: Sequence[str], wall_ms: int) -> None:
        """Note where a peer was met just now. What was seen longest ago above the limits is dropped."""

    def forget_peer(self, peer: PeerId) -> None:
        """Nothing happens when it is not known."""

    def known_peers(self) -> Mapping[PeerId, tuple[str, ...]]:
        """Addresses by peer, last seen first."""


class State(Ledger, Records, Peers, Protocol):
    """All of it."""
