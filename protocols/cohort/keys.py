"""The secrets of one member in one cohort, and what it seals for the others.

Nothing here is a cipher of our own: X25519, XSalsa20-Poly1305 (PyNaCl), HKDF (RFC 5869) and SHA-256, put together.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import CryptoError
from nacl.exceptions import RuntimeError as ZeroError
from nacl.secret import SecretBox

from protocols.cohort.shamir import PRIME, SHARE_BYTES, split
from protocols.errors import RemoteProtocolError

KEY_BYTES: Final = 32
BOX_BYTES: Final = 2 * SHARE_BYTES + SecretBox.MACBYTES
_SALT: Final = b"meshnode/cohort/1"
_WIDE: Final = 80  # bytes that are reduced to an element of the field: the bias is below 2^-118
_ONCE: Final = bytes(SecretBox.NONCE_SIZE)  # each key seals one text


def derived(secret: bytes, info: bytes, size: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256 (RFC 5869) with the salt of this protocol."""
    key = hmac.digest(_SALT, secret, "sha256")
    out = block = b""
    for counter in range(1, -(-size // 32) + 1):
        block = hmac.digest(key, block + info + bytes((counter,)), "sha256")
        out += block
    return out[:size]


def public(secret: bytes) -> bytes:
    """The X25519 public key."""
    return crypto_scalarmult_base(secret)


def agreed(secret: bytes, theirs: bytes) -> bytes:
    """X25519. Raises RemoteProtocolError for a key of low order, with which everybody knows the result."""
    try:
        return crypto_scalarmult(secret, theirs)
    except ZeroError as error:
        raise RemoteProtocolError("a key of low order is no key") from error


def pair_seed(secret: bytes, theirs: bytes, cohort: bytes) -> bytes:
    """Of the pad that two members share; the same from both sides."""
    return derived(agreed(secret, theirs), b"pair" + cohort)


def commitment(kind: bytes, cohort: bytes, owner: int, holder: int, secret: bytes) -> bytes:
    """What is said of a random secret before it is revealed."""
    return sha256(b"meshnode/cohort/1/" + kind + cohort + bytes((owner, holder)) + secret).digest()


@dataclass(frozen=True, slots=True)
class Pair:
    """One member's shares of another's two secrets. Nobody reveals both."""

    seed: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Secrets:
    """Of one member in one cohort, fresh for each.

    Attributes:
      seal: X25519, for the shares that others send; it is never shared.
      mask: X25519, for the pads with others; revealed by the others if we vanish.
      seed: of the pad of our own; revealed by the others if we don't.
    """

    seal: bytes
    mask: bytes
    seed: bytes

    @classmethod
    def of(cls, entropy: bytes, cohort: bytes) -> Secrets:
        """`entropy`: 32 random bytes that nothing else is made of."""
        return cls(*(derived(entropy, name + cohort) for name in (b"seal", b"mask", b"seed")))


def shares_of(secrets: Secrets, entropy: bytes, cohort: bytes, threshold: int, count: int) -> tuple[Pair, ...]:
    """What each of `count` members is to have of our two secrets."""
    found = []
    for name, secret in ((b"shares-seed", secrets.seed), (b"shares-key", secrets.mask)):
        wide = derived(entropy, name + cohort, _WIDE * (threshold - 1))
        coefficients = [int.from_bytes(wide[at : at + _WIDE], "big") % PRIME for at in range(0, len(wide), _WIDE)]
        found.append(split(int.from_bytes(secret, "big"), coefficients, count))
    return tuple(
        Pair(seed.to_bytes(SHARE_BYTES, "big"), key.to_bytes(SHARE_BYTES, "big"))
        for seed, key in zip(*found, strict=True)
    )


def _box(secret: bytes, theirs: bytes, cohort: bytes, sender: int, receiver: int) -> SecretBox:
    return SecretBox(derived(agreed(secret, theirs), b"box" + cohort + bytes((sender, receiver))))


def seal_pair(pair: Pair, secret: bytes, theirs: bytes, cohort: bytes, sender: int, receiver: int) -> bytes:
    """`BOX_BYTES` that only the receiver can open. Raises RemoteProtocolError for a receiver's key of low order."""
    box = _box(secret, theirs, cohort, sender, receiver)
    return box.encrypt(pair.seed + pair.key, _ONCE).ciphertext


def open_pair(box: bytes, secret: bytes, theirs: bytes, cohort: bytes, sender: int, receiver: int) -> Pair:
    """Raises RemoteProtocolError when it does not open."""
    try:
        plain = _box(secret, theirs, cohort, sender, receiver).decrypt(box, _ONCE)
    except (CryptoError, ValueError) as error:
        raise RemoteProtocolError("the sealed shares can't be opened") from error
    if len(plain) != 2 * SHARE_BYTES:
        raise RemoteProtocolError(f"two shares have {2 * SHARE_BYTES} bytes, not {len(plain)}")
    return Pair(plain[:SHARE_BYTES], plain[SHARE_BYTES:])
