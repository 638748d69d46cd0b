"""Both sides of a pairing: `handle(event, now) -> effects`, and one `deadline`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.pairing.exchange import Exchange, Key
from protocols.pairing.messages import (
    CLOSED,
    CODES,
    CONVERSATION_S,
    NONCE_BYTES,
    Ask,
    Message,
    Proof,
    Refused,
    Sealed,
    Share,
)

RandomBytes = Callable[[int], bytes]


class State(Enum):
    """`asked` to `proved` follow each other; the last two are the ends."""

    NEW = "new"
    ASKED = "asked"
    PROVED = "proved"
    DONE = "done"
    REFUSED = "refused"


class Turn(Enum):
    """What happens to a pairing."""

    BEGIN = "begin"
    ASK = "ask"
    SHARE = "share"
    PROOF = "proof"
    WRONG = "wrong"
    GRANT = "grant"
    SEALED = "sealed"
    REFUSE = "refuse"
    LATE = "late"


OPENER: Final = {
    (State.NEW, Turn.ASK): State.ASKED,
    (State.ASKED, Turn.PROOF): State.PROVED,
    (State.ASKED, Turn.WRONG): State.PROVED,
    (State.PROVED, Turn.GRANT): State.DONE,
    (State.NEW, Turn.REFUSE): State.REFUSED,
    (State.ASKED, Turn.REFUSE): State.REFUSED,
    (State.PROVED, Turn.REFUSE): State.REFUSED,
    (State.NEW, Turn.LATE): State.REFUSED,
    (State.ASKED, Turn.LATE): State.REFUSED,
    (State.PROVED, Turn.LATE): State.REFUSED,
}
JOINER: Final = {
    (State.NEW, Turn.BEGIN): State.ASKED,
    (State.ASKED, Turn.SHARE): State.PROVED,
    (State.PROVED, Turn.SEALED): State.DONE,
    (State.ASKED, Turn.REFUSE): State.REFUSED,
    (State.PROVED, Turn.REFUSE): State.REFUSED,
    (State.ASKED, Turn.LATE): State.REFUSED,
    (State.PROVED, Turn.LATE): State.REFUSED,
}


@dataclass(frozen=True, slots=True)
class Begin:
    """Event of the new device: somebody has typed the PIN."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Event of the opener: give it this ticket."""

    ticket: str


@dataclass(frozen=True, slots=True)
class Deny:
    """Event of the opener: no, with one of CODES and a sentence."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """Event: the deadline has come."""


@dataclass(frozen=True, slots=True)
class Send:
    """Effect."""

    message: Message


@dataclass(frozen=True, slots=True)
class Judged:
    """Effect of the opener: whether the device knows the PIN. The answer is a Grant or a Deny."""

    right: bool
    name: str


@dataclass(frozen=True, slots=True)
class Obtained:
    """Effect of the new device: here is the ticket."""

    ticket: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """Effect of the new device: there is none, and why."""

    code: str
    reason: str


Event = Begin | Grant | Deny | Expired | Message
Effect = Send | Judged | Obtained | Rejected


class _Side:
    table: dict[tuple[State, Turn], State]

    def __init__(self, now: float) -> None:
        self.state = State.NEW
        self._until = now + CONVERSATION_S

    @property
    def deadline(self) -> float | None:
        """When `Expired` is due, monotonic seconds; None when it is over."""
        return None if self.state in (State.DONE, State.REFUSED) else self._until

    def _go(self, turn: Turn, *, ours: bool = False) -> None:
        after = self.table.get((self.state, turn))
        if after is None:
            kind = LocalProtocolError if ours else RemoteProtocolError
            raise kind(f"{turn.value!r} does not come in the state {self.state.value!r} of a pairing")
        self.state = after


class Opener(_Side):
    """One conversation of the device that is a member already."""

    table = OPENER

    def __init__(self, pin: str, *, us: PeerId, joiner: PeerId, now: float, random_bytes: RandomBytes) -> None:
        super().__init__(now)
        self._us, self._joiner, self._pin, self._random = us, joiner, pin, random_bytes
        self._key: Key | None = None
        self._name = ""
        self._right = False

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Raises RemoteProtocolError, LocalProtocolError."""
        match event:
            case Ask(share=share, name=name):
                self._go(Turn.ASK)
                exchange = Exchange(
                    self._pin, joiner=self._joiner, opener=self._us, joins=False, random_bytes=self._random
                )
                self._key, self._name = exchange.finish(share), name
                return (Send(Share(share=exchange.share)),)
            case Proof(proof=proof):
                right = self._key is not None and self._key.is_proof(proof)
                self._go(Turn.PROOF if right else Turn.WRONG)
                self._right = right
                return (Judged(right, self._name),)
            case Grant(ticket):
                if self._key is None or not self._right:
                    raise LocalProtocolError("a ticket for a device that has not proved the PIN")
                self._go(Turn.GRANT, ours=True)
                return (Send(Sealed(sealed=self._key.seal(ticket, self._random(NONCE_BYTES)))),)
            case Deny(code, reason):
                self._go(Turn.REFUSE, ours=True)
                return (Send(Refused(code=code, reason=reason[:500])),)
            case Expired():
                self._go(Turn.LATE, ours=True)
                return (Send(Refused(code=CLOSED, reason=f"nothing came for {CONVERSATION_S:.0f} s; try again")),)
        raise RemoteProtocolError(f"{type(event).__name__} is nothing that a new device says")


class Joiner(_Side):
    """The side of the new device."""

    table = JOINER

    def __init__(
        self, pin: str, *, us: PeerId, opener: PeerId, name: str, now: float, random_bytes: RandomBytes
    ) -> None:
        super().__init__(now)
        self._opener, self._name = opener, name[:64]
        self._exchange = Exchange(pin, joiner=us, opener=opener, joins=True, random_bytes=random_bytes)
        self._key: Key | None = None

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Raises RemoteProtocolError, LocalProtocolError."""
        match event:
            case Begin():
                self._go(Turn.BEGIN, ours=True)
                return (Send(Ask(share=self._exchange.share, name=self._name)),)
            case Share(share=share):
                self._go(Turn.SHARE)
                self._key = self._exchange.finish(share)
                return (Send(Proof(proof=self._key.proof())),)
            case Sealed(sealed=sealed):
                self._go(Turn.SEALED)
                if self._key is None:
                    raise LocalProtocolError("a ticket came before there was a key")
                return (Obtained(self._key.open(sealed)),)
            case Refused(code=code, reason=reason):
                self._go(Turn.REFUSE)
                if code not in CODES:
                    raise RemoteProtocolError(f"a pairing was refused with the unknown code {code!r}")
                return (Rejected(code, reason),)
            case Expired():
                self._go(Turn.LATE, ours=True)
                reason = f"{short(self._opener)} did not answer within {CONVERSATION_S:.0f} s"
                return (Rejected(CLOSED, reason),)
        raise RemoteProtocolError(f"{type(event).__name__} is nothing that the other device says")
