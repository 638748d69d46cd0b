"""Who a node is: its Ed25519 key. The libp2p peer id is derived from it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from nacl.signing import SigningKey

from meshnode.core.errors import IdentityError
from meshnode.core.paths import Paths
from meshnode.membership.keyfile import SEED_BYTES, Passphrase, load_key, save_key
from protocols.envelope import sign_record
from protocols.ids import PeerId, peer_id_of

RandomBytes = Callable[[int], bytes]


class Identity:
    """A node key in memory. Its text form shows the peer id, never the seed."""

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self._peer_id = peer_id_of(bytes(self._key.verify_key))

    @classmethod
    def create(
        cls, folder: Path, *, passphrase: str | None = None, random_bytes: RandomBytes = secrets.token_bytes
    ) -> Identity:
        """Make a new key in a data folder.

        Raises IdentityError when there is one already (it is never overwritten), DiskError when it can't be written.
        """
        path = Paths(folder).key
        if path.exists():
            raise IdentityError(f"{path} exists already: this node has a key, and it is never replaced silently")
        seed = random_bytes(SEED_BYTES)
        save_key(path, seed, random_bytes=random_bytes, passphrase=passphrase or None)
        return cls(seed)

    @classmethod
    def load(cls, folder: Path, passphrase: Passphrase = None) -> Identity:
        """The key of a data folder; `passphrase` (or a function that gives it) if it is protected.

        Raises IdentityError: missing, open to other users, damaged, no passphrase or a wrong one.
        """
        if not cls.exists(folder):
            raise IdentityError(
                f"there is no node in {folder} yet: {Paths(folder).key} does not exist. Make a network with "
                "`meshnode init`, or enter one with `meshnode join TICKET`."
            )
        return cls(load_key(Paths(folder).key, what="the node's key", passphrase=passphrase))

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether a data folder has a node key."""
        return Paths(folder).key.exists()

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def signing_key(self) -> SigningKey:
        return self._key

    @property
    def seed(self) -> bytes:
        """32 bytes that are the key. For the network adapter; never logged or sent."""
        return bytes(self._key)

    def sign(self, domain: str, payload: bytes) -> bytes:
        """A signed record (protocols/envelope)."""
        return sign_record(self._key, domain, payload)

    def __repr__(self) -> str:
        return f"Identity({self._peer_id})"
