"""What /meshnode/pair/1 says. See SPEC.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import Union, at, message

PROTOCOL: Final = "/meshnode/pair/1"

WRONG_PIN, CLOSED, BUSY = "wrong-pin", "pairing-closed", "pairing-busy"
CODES: Final = (WRONG_PIN, CLOSED, BUSY)

PIN_DIGITS: Final = 6
OPEN_S: Final = 120.0  # how long pairing stays open
MAX_WRONG: Final = 3  # PINs; then pairing is closed
CONVERSATION_S: Final = 10.0  # from the first message to the ticket
SHARE_BYTES: Final = 32  # an element of the Edwards curve
PROOF_BYTES: Final = 32  # HMAC-SHA256
NONCE_BYTES: Final = 24  # of a SecretBox
MAX_TICKET_BYTES: Final = 8192
MAX_SEALED_BYTES: Final = NONCE_BYTES + 16 + MAX_TICKET_BYTES
MAX_MESSAGE_BYTES: Final = 12 * 1024


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """First message of the new device: its half of the key exchange."""

    share: bytes = at(1, size=SHARE_BYTES)
    name: str = at(2, limit=64)  # for the people at the other screen


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The other half. It says nothing about the PIN."""

    share: bytes = at(1, size=SHARE_BYTES)


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The new device has the same key, so it was told the PIN."""

    proof: bytes = at(1, size=PROOF_BYTES)


@message(tag=4)
@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """The ticket, readable only with the key."""

    sealed: bytes = at(1, limit=MAX_SEALED_BYTES)


@message(tag=5)
@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """No, and why: a sentence for the people at the new device."""

    code: str = at(1, limit=32)
    reason: str = at(2, limit=500)


Message = Ask | Share | Proof | Sealed | Refused
PAIRING: Final[Union[Message]] = Union(PROTOCOL, Ask, Share, Proof, Sealed, Refused, limit=MAX_MESSAGE_BYTES)
