"""How the network secret travels in a Granted: readable only by the holder of the ticket.

XSalsa20-Poly1305 (NaCl SecretBox) under a key derived by BLAKE2b from the invite's secret, bound to invite and
joiner. The connection is encrypted already; this keeps the secret out of reach of whatever lies between.
"""

from __future__ import annotations

from typing import Final

import nacl.encoding
import nacl.hash
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.membership.messages import SECRET_BYTES

NONCE_BYTES: Final = SecretBox.NONCE_SIZE  # 24
_PERSON: Final = b"meshnode/join/1"


def _box(invite: bytes, invite_secret: bytes, joiner: PeerId) -> SecretBox:
    key = nacl.hash.blake2b(
        invite + joiner.encode("ascii"),
        digest_size=SecretBox.KEY_SIZE,
        key=invite_secret,
        person=_PERSON,
        encoder=nacl.encoding.RawEncoder,
    )
    return SecretBox(key)


def seal_secret(secret: bytes, *, invite: bytes, invite_secret: bytes, joiner: PeerId, nonce: bytes) -> bytes:
    """Nonce and box. `nonce` is 24 random bytes, never used twice."""
    return bytes(_box(invite, invite_secret, joiner).encrypt(secret, nonce))


def open_secret(sealed: bytes, *, invite: bytes, invite_secret: bytes, joiner: PeerId) -> bytes:
    """The 32-byte network secret. Raises RemoteProtocolError when the box does not open."""
    try:
        secret = _box(invite, invite_secret, joiner).decrypt(sealed)
    except CryptoError as error:
        raise RemoteProtocolError("the network secret in the answer to a ticket can't be opened") from error
    if len(secret) != SECRET_BYTES:
        raise RemoteProtocolError(f"a network secret has {SECRET_BYTES} bytes, not {len(secret)}")
    return secret
