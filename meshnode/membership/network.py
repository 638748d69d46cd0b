"""The network membership of a data folder.

`network/network.cbor` (0600): canonical CBOR {1: network record, 2: network secret, 3: chain, 4: node
name, 5: the record that renewed the secret}; secrets that came later are in the state file (`secrets.py`).
`network/founder.key` (0600): the founder's key, in the format of `keyfile.py`; needed only to put out a device
that it has certified itself, so it may be moved to a safe place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nacl.signing import SigningKey

from meshnode.core.errors import IdentityError
from meshnode.core.paths import Paths
from meshnode.membership.files import read_private, write_private
from meshnode.membership.keyfile import Passphrase, load_key, save_key
from meshnode.membership.port import Membership
from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError
from protocols.membership.messages import MAX_LINKS, MAX_NETWORK_BYTES, MAX_RENEWAL_BYTES, SECRET_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    network: bytes = at(1, limit=MAX_NETWORK_BYTES)
    secret: bytes = at(2, size=SECRET_BYTES)
    chain: tuple[bytes, ...] = at(3, limit=MAX_LINKS)
    name: str = at(4, limit=64)
    renewal: bytes = at(5, limit=MAX_RENEWAL_BYTES, default=b"")


def network_path(folder: Path) -> Path:
    return Paths(folder).network / "network.cbor"


def founder_path(folder: Path) -> Path:
    return Paths(folder).network / "founder.key"


def save_network(folder: Path, membership: Membership) -> None:
    """Write the membership of a data folder. Raises DiskError."""
    stored = _Stored(
        network=membership.network_record,
        secret=membership.secret,
        chain=membership.chain,
        name=membership.name,
        renewal=membership.renewal,
    )
    write_private(network_path(folder), encode(stored))


def load_network(folder: Path) -> Membership:
    """The membership of a data folder.

    Raises IdentityError: none yet, open to other users, or damaged.
    """
    path = network_path(folder)
    if not path.exists():
        raise IdentityError(
            "this node belongs to no network yet. Make one with `meshnode init`, or enter one with "
            f"`meshnode join TICKET` (there is no {path})"
        )
    data = read_private(path, "the network membership of this node")
    try:
        stored = decode(_Stored, data)
        membership = Membership(
            network_record=stored.network,
            secret=stored.secret,
            chain=stored.chain,
            name=stored.name,
            renewal=stored.renewal,
        )
        membership.trust()
    except RemoteProtocolError as error:
        raise IdentityError(f"{path} is damaged ({error}). Restore it from a backup, or join again.") from error
    return membership


def has_network(folder: Path) -> bool:
    """Whether a data folder belongs to a network."""
    return network_path(folder).exists()


def save_founder(
    folder: Path, seed: bytes, *, random_bytes: Callable[[int], bytes], passphrase: str | None = None
) -> None:
    """Write the founder's key of a network. Raises DiskError."""
    save_key(founder_path(folder), seed, random_bytes=random_bytes, passphrase=passphrase)


def load_founder(folder: Path, passphrase: Passphrase = None) -> SigningKey | None:
    """The founder's key, if this data folder has it. Raises IdentityError when it can't be used."""
    path = founder_path(folder)
    if not path.exists():
        return None
    return SigningKey(load_key(path, what="the founder's key of the network", passphrase=passphrase))
