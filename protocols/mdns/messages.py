"""What a node tells the members on its local network: who it is and where it listens, sealed. See SPEC.md.

NaCl's SecretBox under a key that is derived from the network's secret; every sealed hint has the same length, so that
nobody else learns more than that some node is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import nacl.encoding
import nacl.hash
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError

SERVICE: Final = "_p2p._udp.local"  # of libp2p; github.com/libp2p/specs/blob/master/discovery/mdns.md
NONCE_BYTES: Final = SecretBox.NONCE_SIZE  # 24
NAME_BYTES: Final = 16  # of randomness in the name of a node, which changes

MAX_ADDRESSES: Final = 8
PLAIN_BYTES: Final = 640  # of a hint, padded: 8 addresses of 60 characters, and the peer id
KEYS: Final = (b"m0=", b"m1=", b"m2=")  # the strings of a TXT record, in this order, that hold the box together
STRING_BYTES: Final = 250

_SEALED_BYTES: Final = NONCE_BYTES + PLAIN_BYTES + SecretBox.MACBYTES
_PERSON: Final = b"meshnode/mdns/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    peer: str = at(1, limit=64)
    addresses: tuple[str, ...] = at(2, limit=MAX_ADDRESSES)  # multiaddrs without /p2p/<peer id>


class Seal:
    """Seals and opens the hints of one network."""

    def __init__(self, secret: bytes, older: Iterable[bytes] = ()) -> None:
        """`secret`: the network's. `older`: those before it, which members that were away still have."""
        self._box = _box_of(secret)
        self._boxes = (self._box, *map(_box_of, older))

    def seal(self, hint: Hint, nonce: bytes) -> tuple[bytes, ...]:
        """The strings of a TXT record; addresses that find no room are left out.

        nonce: 24 random bytes, never used again.
        """
        addresses = hint.addresses[:MAX_ADDRESSES]
        while len(plain := encode(Hint(peer=hint.peer, addresses=addresses))) > PLAIN_BYTES - 2:
            addresses = addresses[:-1]
        padded = len(plain).to_bytes(2, "big") + plain.ljust(PLAIN_BYTES - 2, b"\x00")
        sealed = bytes(self._box.encrypt(padded, nonce))
        return tuple(
            key + sealed[start : start + STRING_BYTES]
            for key, start in zip(KEYS, range(0, len(sealed), STRING_BYTES), strict=True)
        )

    def open(self, strings: tuple[bytes, ...]) -> Hint | None:
        """The hint of a member of this network; None: of somebody else.

        Raises RemoteProtocolError: of a member, but wrong.
        """
        sealed = b"".join(
            string[len(key) :] for string, key in zip(strings, KEYS, strict=False) if string.startswith(key)
        )
        if len(strings) != len(KEYS) or len(sealed) != _SEALED_BYTES:
            return None
        plain = next((plain for box in self._boxes if (plain := _opened(box, sealed)) is not None), None)
        if plain is None:
            return None
        length = int.from_bytes(plain[:2], "big")
        if length > PLAIN_BYTES - 2 or any(plain[2 + length :]):
            raise RemoteProtocolError("a hint on the local network is not padded as it should be")
        return decode(Hint, plain[2 : 2 + length])


def _box_of(secret: bytes) -> SecretBox:
    key = nacl.hash.blake2b(
        b"", digest_size=SecretBox.KEY_SIZE, key=secret, person=_PERSON, encoder=nacl.encoding.RawEncoder
    )
    return SecretBox(key)


def _opened(box: SecretBox, sealed: bytes) -> bytes | None:
    try:
        return bytes(box.decrypt(sealed))
    except CryptoError:
        return None
