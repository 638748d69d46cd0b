"""Who may have our blocks, who comes first, and how fast all of them get them."""

from __future__ import annotations

from meshnode.services.port import Guests, Members
from protocols.ids import PeerId


class Access:
    """Our owner's rule (`content.share`), applied to peers."""

    def __init__(self, share: str, members: Members, guests: Guests, upload: int = 0) -> None:
        """
        Args:
          share: who gets our blocks: "members", "guests" (the peers that a setting names, too) or "anyone".
          upload: bytes a second, to all together; 0: as fast as they read.
        """
        self.upload = upload
        self._share = share
        self._members = members
        self._guests = guests

    @property
    def public(self) -> bool:
        """Whether everybody who connects gets our blocks, strangers among them."""
        return self._share == "anyone"

    def is_member(self, peer: PeerId) -> bool:
        """Members come before everybody else."""
        return bool(self._members.roles_of(peer))

    def may_have(self, peer: PeerId) -> bool:
        """Whether a peer gets our blocks; to others it looks as if we held none."""
        return self.public or self.is_member(peer) or (self._share == "guests" and peer in self._guests.configured)
