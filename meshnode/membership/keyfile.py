"""An Ed25519 seed in a file, plain or under a passphrase. Text, four lines:

meshnode-key 1
peer 12D3KooW...                     who it belongs to, readable without the passphrase
plain <seed, 64 hex digits>          or: argon2id <ops> <memory bytes> <salt, hex>
(nothing)                            or: box <SecretBox of the seed, hex>
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import nacl.pwhash.argon2id as argon2id
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox
from nacl.signing import SigningKey

from meshnode.core.errors import IdentityError
from meshnode.membership.files import read_private, write_private
from protocols.ids import PeerId, peer_id_of

Passphrase = str | Callable[[], str] | None

SEED_BYTES: Final = 32
_HEAD: Final = "meshnode-key 1"
# libsodium's "interactive" limits: 2 passes over 64 MiB, about 0.1 s on a small device.
_OPS: Final = argon2id.OPSLIMIT_INTERACTIVE
_MEMORY: Final = argon2id.MEMLIMIT_INTERACTIVE
# A file that asks for more was not written by us; obeying it would stop the node.
_MAX_OPS: Final = 16
_MAX_MEMORY: Final = 1 << 30


def _key(passphrase: str, ops: int, memory: int, salt: bytes) -> bytes:
    return argon2id.kdf(SecretBox.KEY_SIZE, passphrase.encode(), salt, opslimit=ops, memlimit=memory)


def save_key(path: Path, seed: bytes, *, random_bytes: Callable[[int], bytes], passphrase: str | None = None) -> None:
    """Write a key file. Raises DiskError."""
    peer = peer_id_of(bytes(SigningKey(seed).verify_key))
    lines = [_HEAD, f"peer {peer}"]
    if passphrase is None:
        lines.append(f"plain {seed.hex()}")
    else:
        salt = random_bytes(argon2id.SALTBYTES)
        box = SecretBox(_key(passphrase, _OPS, _MEMORY, salt)).encrypt(seed, random_bytes(SecretBox.NONCE_SIZE))
        lines += [f"argon2id {_OPS} {_MEMORY} {salt.hex()}", f"box {bytes(box).hex()}"]
    write_private(path, "\n".join([*lines, ""]).encode("ascii"))


def load_key(path: Path, *, what: str, passphrase: Passphrase = None) -> bytes:
    """The 32-byte seed. `passphrase` may be a function, asked only when the file needs one.

    Raises IdentityError: missing, open to others, damaged, no passphrase or a wrong one.
    """
    lines = read_private(path, what).decode("utf-8", "replace").split("\n")
    try:
        if lines[0] != _HEAD:
            raise ValueError
        owner = _words(lines[1], "peer", 1)[0]
        if lines[2].startswith("plain "):
            seed = bytes.fromhex(_words(lines[2], "plain", 1)[0])
        else:
            ops, memory, salt = _words(lines[2], "argon2id", 3)
            sealed = bytes.fromhex(_words(lines[3], "box", 1)[0])
            seed = _unseal(path, passphrase, int(ops), int(memory), bytes.fromhex(salt), sealed)
        if len(seed) != SEED_BYTES or peer_id_of(bytes(SigningKey(seed).verify_key)) != owner:
            raise ValueError
    except (ValueError, IndexError):
        raise IdentityError(f"{path} is damaged: it does not hold {what}. Restore it from a backup.") from None
    return seed


def is_protected(path: Path) -> bool:
    """Whether a key file needs a passphrase. Raises IdentityError when it can't be read."""
    return b"\nargon2id " in read_private(path, "a key")


def peer_of_key(path: Path) -> PeerId:
    """Whose key a file holds, which needs no passphrase. Raises IdentityError."""
    try:
        return PeerId(_words(read_private(path, "a key").decode("utf-8", "replace").split("\n")[1], "peer", 1)[0])
    except (ValueError, IndexError):
        raise IdentityError(f"{path} is damaged: it holds no key. Remove it.") from None


def _words(line: str, head: str, count: int) -> list[str]:
    first, *rest = line.split(" ")
    if first != head or len(rest) != count:
        raise ValueError
    return rest


def _unseal(path: Path, passphrase: Passphrase, ops: int, memory: int, salt: bytes, sealed: bytes) -> bytes:
    if ops > _MAX_OPS or memory > _MAX_MEMORY:
        raise ValueError
    given = passphrase() if callable(passphrase) else passphrase
    if not given:
        raise IdentityError(f"{path} is protected by a passphrase; set MESHNODE_PASSPHRASE or type it when asked")
    try:
        return SecretBox(_key(given, ops, memory, salt)).decrypt(sealed)
    except CryptoError:
        raise IdentityError(f"the passphrase for {path} is wrong") from None
