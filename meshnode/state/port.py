"""What services see of the things a node keeps: its membership and its small durable state.

Implemented by `network.py` and `database.py`. Every call is blocking and short (see `database.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from nacl.signing import SigningKey

from protocols.codec import decode
from protocols.envelope import open_record
from protocols.ids import PeerId
from protocols.membership import Network, Trust, Untrusted, network_id, open_network
from protocols.membership.messages import WITHDRAWAL, Withdrawal


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Our place in a network."""

    network_record: bytes = field(repr=False)  # signed by a founder
    secret: bytes = field(repr=False)  # the network secret, 32 bytes
    chain: tuple[bytes, ...] = field(repr=False)  # ends with our certificate
    name: str = ""  # of this node, as it asked to be called

    @property
    def network(self) -> Network:
        return open_network(self.network_record)

    @property
    def network_id(self) -> str:
        return network_id(self.network)

    def trust(self) -> Trust:
        """A new judge of chains, without withdrawals."""
        return Trust(self.network)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """One line of the ledger. The secret itself is only in the ticket."""

    id: bytes
    secret_hash: bytes = field(repr=False)  # SHA-256
    roles: tuple[str, ...]
    uses: int  # 0: any number
    created_ms: int  # UTC milliseconds
    expires_ms: int  # of the ticket; 0: never
    member_ms: int = 0  # how long a certificate lasts that it gives, milliseconds; 0: for ever
    used: int = 0  # different peers that redeemed it


class Signer(Protocol):
    """The node key."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def signing_key(self) -> SigningKey: ...


class Ledger(Protocol):
    def redeem(self, invite: bytes, secret: bytes, peer: PeerId, wall_ms: int, *, not_before_ms: int = 0) -> Invite:
        """Use an invite once for `peer`; the same peer may do it again while the invite has not expired.

        `not_before_ms`: rights were taken from the peer then; only an invite made later gives it new ones.
        Raises Declined `forbidden` (unknown here, wrong secret, made too early), `invite-expired`, `invite-used`.
        """

    def next_serial(self) -> int:
        """1, 2, 3, ...: counts the certificates that this node signed."""


class Records(Protocol):
    """Signed records that outlive a restart: one per (kind, signer)."""

    def put_record(self, kind: str, signer: str, data: bytes) -> None: ...

    def record(self, kind: str, signer: str) -> bytes | None: ...

    def records(self, kind: str) -> dict[str, bytes]:
        """Data by signer."""

    def remove_record(self, kind: str, signer: str) -> None: ...


class Peers(Protocol):
    """Where peers were met."""

    def remember_peer(self, peer: PeerId, addresses: Sequence[str], wall_ms: int) -> None: ...

    def known_peers(self) -> Mapping[PeerId, tuple[str, ...]]:
        """Addresses by peer, last seen first."""

    def forget_peer(self, peer: PeerId) -> None: ...


class State(Ledger, Records, Peers, Protocol):
    """All of it: what `database.py` implements."""


def keep_withdrawal(records: Records, data: bytes) -> None:
    """Keep a withdrawal that a `Trust` has accepted: one per subject and signer."""
    opened = open_record(data, domain=WITHDRAWAL)
    subject = decode(Withdrawal, opened.payload).peer
    records.put_record(WITHDRAWAL, f"{subject}/{opened.signer}", data)


def restore_withdrawals(trust: Trust, records: Records, wall_ms: int) -> bool:
    """Teach `trust` the withdrawals kept so far; whether there was something new."""
    new = False
    for data in records.records(WITHDRAWAL).values():
        with suppress(Untrusted):  # kept by an earlier version, or dated by a clock that was wrong
            new |= trust.withdraw(data, wall_ms) is not None
    return new
