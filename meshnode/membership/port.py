"""What services see of a node's membership: its place in the network, its key, and the invites it has given out.

`network.py` reads the membership, `identity.py` the key; the ledger is part of the node's state (`meshnode/state`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from nacl.signing import SigningKey

from protocols.ids import PeerId
from protocols.membership import Network, Trust, network_id, open_network


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Our place in a network."""

    network_record: bytes = field(repr=False)  # signed by a founder
    secret: bytes = field(repr=False)  # the network secret, 32 bytes, when we entered
    chain: tuple[bytes, ...] = field(repr=False)  # ends with our certificate
    name: str = ""  # of this node, as it asked to be called
    renewal: bytes = field(default=b"", repr=False)  # signed word for that secret; empty for the network's first

    @property
    def network(self) -> Network:
        return open_network(self.network_record)

    @property
    def network_id(self) -> str:
        return network_id(self.network)

    def trust(self) -> Trust:
        """A new judge of chains, without withdrawals."""
        return Trust(self.network)


class Signer(Protocol):
    """The node key."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def signing_key(self) -> SigningKey: ...


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
    revoked_ms: int = 0  # when it was made worthless, UTC milliseconds; 0: it was not

    @property
    def used_up(self) -> bool:
        """Whether it lets in nobody new, however long it lasts."""
        return 0 < self.uses <= self.used

    def usable(self, wall_ms: int) -> bool:
        """Whether it lets somebody in who comes at `wall_ms` (UTC)."""
        return not self.revoked_ms and not self.used_up and not 0 < self.expires_ms <= wall_ms


class Ledger(Protocol):
    """The invites of this node, and who redeemed them."""

    def add_invite(self, invite: Invite) -> None: ...

    def invites(self) -> tuple[Invite, ...]:
        """Oldest first."""

    def revoke_invite(self, invite: bytes, wall_ms: int) -> bool:
        """Make an invite worthless, which stays in the ledger; whether it was not so before."""

    def revoke_redeemed(self, peer: PeerId, made_by_ms: int) -> int:
        """The same for every invite made by then that `peer` has redeemed, whoever else it was for; how many."""

    def redeem(self, invite: bytes, secret: bytes, peer: PeerId, wall_ms: int, *, not_before_ms: int = 0) -> Invite:
        """Use an invite once for `peer`; the same peer may do it again while the invite has not expired.

        `not_before_ms`: rights were taken from the peer then; only an invite made later gives it new ones.
        Raises Declined `forbidden` (unknown here, wrong secret, made too early), `invite-expired`, `invite-used`.
        """

    def next_serial(self) -> int:
        """1, 2, 3, ...: counts the certificates that this node signed."""
