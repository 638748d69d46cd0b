"""The key exchange: SPAKE2 over the Edwards curve, with the peer ids of both sides in it.

The library is written in Python, which is slow (8 ms a side), and can be heard by a program on the same machine that
times it; a PIN lives for two minutes, so that says nothing that is worth anything afterwards.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any, Final

from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId
from protocols.pairing.messages import MAX_TICKET_BYTES, NONCE_BYTES, PIN_DIGITS

_PROOF: Final = b"meshnode/pair/1 proof"
_TICKET: Final = b"meshnode/pair/1 ticket"


class Exchange:
    """One side of one exchange. `share` goes to the other side, `finish` takes its share."""

    def __init__(
        self, pin: str, *, joiner: PeerId, opener: PeerId, joins: bool, random_bytes: Callable[[int], bytes]
    ) -> None:
        """`joins`: whether we are the new device."""
        from spake2 import SPAKE2_A, SPAKE2_B  # takes 30 ms, which only a node that is paired needs to spend

        if len(pin) != PIN_DIGITS or not (pin.isascii() and pin.isdigit()):
            raise LocalProtocolError(f"a PIN has {PIN_DIGITS} digits")
        kind, self._other = (SPAKE2_A, b"B") if joins else (SPAKE2_B, b"A")
        self._side: Any = kind(
            pin.encode("ascii"), idA=joiner.encode("ascii"), idB=opener.encode("ascii"), entropy_f=random_bytes
        )
        self.share: Final[bytes] = self._side.start()[1:]  # without the letter of the side, which a message implies

    def finish(self, share: bytes) -> Key:
        """The key that both sides have if both have the same PIN. Raises RemoteProtocolError: it is no share."""
        from spake2 import SPAKEError
        from spake2.ed25519_basic import NotOnCurve

        try:
            return Key(self._side.finish(self._other + share))
        except (SPAKEError, NotOnCurve, ValueError) as error:
            raise RemoteProtocolError("what should be half of a key exchange is none") from error


class Key:
    """What an exchange has given."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def proof(self) -> bytes:
        """Only who has the key can say this."""
        return hmac.digest(self._secret, _PROOF, hashlib.sha256)

    def is_proof(self, proof: bytes) -> bool:
        """Whether the other side has the same key."""
        return hmac.compare_digest(proof, self.proof())

    def seal(self, ticket: str, nonce: bytes) -> bytes:
        """`nonce`: 24 random bytes."""
        data = ticket.encode("ascii")
        if len(data) > MAX_TICKET_BYTES or len(nonce) != NONCE_BYTES:
            raise LocalProtocolError(f"a ticket of {len(data)} bytes can't be sealed; limit {MAX_TICKET_BYTES}")
        return bytes(self._box().encrypt(data, nonce))

    def open(self, sealed: bytes) -> str:
        """The ticket. Raises RemoteProtocolError: it was not sealed with this key."""
        try:
            return self._box().decrypt(sealed).decode("ascii")
        except (CryptoError, ValueError) as error:
            raise RemoteProtocolError("the ticket was not sealed by who knows the PIN") from error

    def _box(self) -> SecretBox:
        return SecretBox(hmac.digest(self._secret, _TICKET, hashlib.sha256))
