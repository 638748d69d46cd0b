"""The state port in memory, for tests and simulations. Keep the object to start a node again with its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshnode.membership.port import Invite
from meshnode.state.invites import check_invite
from meshnode.state.port import MAX_ADDRESSES, MAX_PEERS
from protocols.ids import PeerId


class MemoryState:
    """Small durable records that last as long as this object."""

    def __init__(self) -> None:
        self._invites: dict[bytes, Invite] = {}
        self._redeemed: dict[bytes, set[PeerId]] = {}
        self._serial = 0
        self._seen: dict[PeerId, dict[str, int]] = {}  # peer -> address -> UTC milliseconds
        self._records: dict[str, dict[str, bytes]] = {}

    # Invites

    def add_invite(self, invite: Invite) -> None:
        self._invites[invite.id] = invite
        self._redeemed[invite.id] = set()

    def invites(self) -> tuple[Invite, ...]:
        invites = (replace(invite, used=len(self._redeemed[invite.id])) for invite in self._invites.values())
        return tuple(sorted(invites, key=lambda invite: (invite.created_ms, invite.id)))

    def revoke_invite(self, invite: bytes, wall_ms: int) -> bool:
        known = self._invites.get(invite)
        if known is None or known.revoked_ms:
            return False
        self._invites[invite] = replace(known, revoked_ms=wall_ms)
        return True

    def revoke_redeemed(self, peer: PeerId, made_by_ms: int) -> int:
        old = [invite.id for invite in self.invites() if invite.created_ms <= made_by_ms]
        return sum(self.revoke_invite(invite, made_by_ms) for invite in old if peer in self._redeemed[invite])

    def redeem(self, invite: bytes, secret: bytes, peer: PeerId, wall_ms: int, *, not_before_ms: int = 0) -> Invite:
        peers = self._redeemed.get(invite, set())
        known = self._invites.get(invite)
        found = None if known is None else replace(known, used=len(peers))
        check_invite(found, secret, peer, wall_ms, not_before_ms=not_before_ms, again=peer in peers)
        peers.add(peer)
        assert found is not None  # or it was declined
        return found

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    # Peers

    def remember_peer(self, peer: PeerId, addresses: Sequence[str], wall_ms: int) -> None:
        if not addresses:
            return
        seen = self._seen.setdefault(peer, {})
        for address in addresses[:MAX_ADDRESSES]:
            seen[address] = max(wall_ms, seen.get(address, wall_ms))
        newest = sorted(seen, key=lambda address: (-seen[address], address))[:MAX_ADDRESSES]
        self._seen[peer] = {address: seen[address] for address in newest}
        for old in sorted(self._seen, key=self._rank)[MAX_PEERS:]:
            del self._seen[old]

    def forget_peer(self, peer: PeerId) -> None:
        self._seen.pop(peer, None)

    def known_peers(self) -> dict[PeerId, tuple[str, ...]]:
        return {peer: tuple(self._seen[peer]) for peer in sorted(self._seen, key=self._rank)}

    def _rank(self, peer: PeerId) -> tuple[int, PeerId]:
        return -max(self._seen[peer].values()), peer

    # Records

    def put_record(self, kind: str, signer: str, data: bytes) -> None:
        self._records.setdefault(kind, {})[signer] = data

    def record(self, kind: str, signer: str) -> bytes | None:
        return self._records.get(kind, {}).get(signer)

    def records(self, kind: str) -> dict[str, bytes]:
        return dict(sorted(self._records.get(kind, {}).items()))

    def remove_record(self, kind: str, signer: str) -> None:
        self._records.get(kind, {}).pop(signer, None)
