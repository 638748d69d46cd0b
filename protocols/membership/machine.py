"""Both sides of /meshnode/hello/1 as one state machine without I/O.

Rule 1: every state and every transition is in TRANSITIONS, nowhere else. A check that fails takes any waiting
state to REFUSED instead, with a Refused sent to the peer.
Rule 2: no clock, no randomness, no await. Monotonic time comes in as `now` (deadlines), UTC as `wall_ms`
(certificates, clock difference); messages go out as effects.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership.messages import (
    CLOCK,
    CODES,
    FORBIDDEN,
    HELLO_S,
    MAX_CLOCK_MS,
    MAX_PROOFS,
    OTHER_NETWORK,
    PROTOCOL,
    STRANGER,
    Granted,
    Hello,
    Join,
    NewSecret,
    Refused,
    Roster,
    Welcome,
    printable,
)
from protocols.membership.renewal import Secret, Secrets
from protocols.membership.trust import Standing, Trust, Untrusted, day

MAX_ROSTERS: Final = 64  # on one stream: every member and withdrawal that a node remembers


_NO_SECRET: Final = "it does not know the secret of this network; let it join with a new ticket"


class State(Enum):
    IDLE = "idle"
    GREETING = "greeting"  # asker: Hello sent
    CONFIRMING = "confirming"  # asker: accepted the answerer, waits to be accepted
    PROVING = "proving"  # answerer: accepted the asker's chain, waits for its proof
    JOINING = "joining"  # joiner: Join sent
    DECIDING = "deciding"  # issuer: looking at its ledger
    ADMITTED = "admitted"
    GRANTED = "granted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Begin:
    """Ours: say hello."""


@dataclass(frozen=True, slots=True)
class BeginJoin:
    """Ours: redeem a ticket."""

    join: Join


@dataclass(frozen=True, slots=True)
class Grant:
    """Ours: the ledger says yes."""

    granted: Granted


@dataclass(frozen=True, slots=True)
class Deny:
    """Ours: the ledger says no."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline has passed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer closed its side of the stream."""


Ours = Begin | BeginJoin | Grant | Deny | Expired
Event = Ours | Ended | Hello | Welcome | Refused | Join | Granted | Roster | NewSecret

TRANSITIONS: Final[Mapping[tuple[State, type[Event]], State]] = {
    (State.IDLE, Begin): State.GREETING,
    (State.GREETING, Hello): State.CONFIRMING,
    (State.CONFIRMING, Welcome): State.ADMITTED,
    (State.IDLE, Hello): State.PROVING,
    (State.PROVING, Welcome): State.ADMITTED,
    (State.ADMITTED, Roster): State.ADMITTED,
    (State.ADMITTED, NewSecret): State.ADMITTED,
    (State.ADMITTED, Ended): State.ADMITTED,
    (State.IDLE, BeginJoin): State.JOINING,
    (State.JOINING, Granted): State.GRANTED,
    (State.IDLE, Join): State.DECIDING,
    (State.DECIDING, Grant): State.GRANTED,
    (State.DECIDING, Deny): State.REFUSED,
    (State.GRANTED, Ended): State.GRANTED,
    (State.GREETING, Refused): State.REFUSED,
    (State.CONFIRMING, Refused): State.REFUSED,
    (State.PROVING, Refused): State.REFUSED,
    (State.JOINING, Refused): State.REFUSED,
    (State.IDLE, Expired): State.REFUSED,
    (State.GREETING, Expired): State.REFUSED,
    (State.CONFIRMING, Expired): State.REFUSED,
    (State.PROVING, Expired): State.REFUSED,
    (State.JOINING, Expired): State.REFUSED,
    (State.DECIDING, Expired): State.REFUSED,
    (State.REFUSED, Ended): State.REFUSED,
}
_OURS: Final = (Begin, BeginJoin, Grant, Deny, Expired)
CLOSED: Final = (State.ADMITTED, State.GRANTED, State.REFUSED)  # the outcome is known


@dataclass(frozen=True, slots=True)
class Send:
    message: Hello | Welcome | Refused | Join | Granted


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A peer that proved its membership."""

    peer: PeerId
    name: str
    software: str
    standing: Standing
    chain: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Trusted:
    """The peer proved its membership: serve it. We are not yet sure that it serves us."""

    member: Member
    clock_offset_ms: int  # its clock minus ours


@dataclass(frozen=True, slots=True)
class MutuallyAdmitted:
    """Both sides have accepted each other."""

    behind: bool  # the peer does not know our present secret


@dataclass(frozen=True, slots=True)
class Redeem:
    """Look at the ledger, then answer with Grant or Deny."""

    join: Join


@dataclass(frozen=True, slots=True)
class Joined:
    """Our ticket was taken. What it holds is still to be checked against the ticket's founders."""

    granted: Granted


@dataclass(frozen=True, slots=True)
class RosterReceived:
    roster: Roster


@dataclass(frozen=True, slots=True)
class SecretReceived:
    """The peer knows a newer secret, it says: still to be checked."""

    message: NewSecret


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The conversation ended with a refusal."""

    code: str
    reason: str
    by_us: bool


Effect = Send | Trusted | MutuallyAdmitted | Redeem | Joined | RosterReceived | SecretReceived | Rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What we show: our chain, our name, and the network's secrets that prove we are inside."""

    peer: PeerId
    name: str
    software: str
    chain: tuple[bytes, ...] = field(repr=False)
    secrets: Secrets = field(repr=False)


@dataclass(frozen=True, slots=True)
class Round:
    """The two parties of one hello, in the order asker, answerer."""

    network: str
    asker: PeerId
    answerer: PeerId
    asker_nonce: bytes
    answerer_nonce: bytes

    def proof(self, secret: bytes, side: str) -> bytes:
        """HMAC-SHA256 that shows knowledge of the secret; `side` ("asker", "answerer") stops reflection."""
        parts = (PROTOCOL, self.network, side, self.asker, self.answerer)
        text = b"".join(len(part).to_bytes(2, "big") + part.encode() for part in parts)
        return hmac.new(secret, text + self.asker_nonce + self.answerer_nonce, hashlib.sha256).digest()


def refusal_of(peer: PeerId, reason: str) -> str:
    """The sentence that both sides read; `reason` speaks of the peer as "it"."""
    return f"{short(peer)} was refused: {reason}"


class HelloMachine:
    """One stream of /meshnode/hello/1 with the peer `theirs` (as the connection proved it).

    `credentials` and `trust` are None only for a joiner, which has no network yet. `nonce`: 16 random bytes.
    `remembers`: whether this chain of this peer was known before the hello. A secret that was replaced proves nothing
    but that; who holds it may be somebody who was put out, with a certificate that was made since.
    """

    def __init__(
        self,
        *,
        theirs: PeerId,
        credentials: Credentials | None,
        trust: Trust | None,
        nonce: bytes,
        now: float,
        remembers: Callable[[PeerId, tuple[bytes, ...]], bool] = lambda peer, chain: False,
    ) -> None:
        self.state = State.IDLE
        self.deadline: float | None = now + HELLO_S  # seconds, same clock as `now`
        self._theirs = theirs
        self._ours = credentials
        self._trust = trust
        self._nonce = nonce
        self._remembers = remembers
        self._secret: Secret | None = None  # the newest that both know
        self._behind = False  # the peer does not know our present one
        self._round: Round | None = None
        self._sent_ms = 0  # our clock when we sent what the peer answers now
        self._member: Member | None = None
        self._rosters = 0
        self._told = False  # the peer has sent a secret

    def handle(self, event: Event, now: float, wall_ms: int) -> tuple[Effect, ...]:
        """Take one event at `now` (seconds, monotonic) and `wall_ms` (UTC milliseconds); return what to do.

        Raises:
          LocalProtocolError: we did something this state does not allow.
          RemoteProtocolError: the peer did. In both cases nothing has changed.
        """
        after = TRANSITIONS.get((self.state, type(event)))
        if after is None:
            blame = LocalProtocolError if isinstance(event, _OURS) else RemoteProtocolError
            if isinstance(event, Ended):
                raise blame(f"the stream was closed in the state {self.state.value} of {PROTOCOL}")
            raise blame(f"{type(event).__name__} in the state {self.state.value} of {PROTOCOL}")
        try:
            effects = self._perform(event, wall_ms)
        except Untrusted as no:
            proofs = self._withdrawals(event) if no.code == FORBIDDEN else ()
            after, effects = State.REFUSED, self._refuse(no.code, refusal_of(self._theirs, str(no)), proofs)
        self.state = after
        if after in CLOSED:
            self.deadline = None
        return effects

    def _perform(self, event: Event, wall_ms: int) -> tuple[Effect, ...]:
        match event:
            case Begin():
                self._sent_ms = wall_ms
                return (Send(self._hello(wall_ms, None)),)
            case Hello():
                return self._heard(event, wall_ms)
            case Welcome():
                return self._welcomed(event, wall_ms)
            case Refused():
                code = event.code if event.code in CODES else STRANGER
                refused = Rejected(code=code, reason=printable(event.reason), by_us=False)
                if not event.withdrawals:
                    return (refused,)
                return (RosterReceived(Roster(withdrawals=event.withdrawals)), refused)
            case Roster():
                if self._rosters >= MAX_ROSTERS:
                    raise RemoteProtocolError(f"more than {MAX_ROSTERS} rosters on one stream of {PROTOCOL}")
                self._rosters += 1
                return (RosterReceived(event),)
            case NewSecret():
                if self._told:
                    raise RemoteProtocolError(f"a second secret on one stream of {PROTOCOL}")
                self._told = True
                return (SecretReceived(event),)
            case BeginJoin():
                return (Send(event.join),)
            case Join():
                self._same_time(event.wall_ms - wall_ms, wall_ms)
                if self._trust is None or event.network != self._trust.id:
                    raise Untrusted(OTHER_NETWORK, "its ticket is of another network than the node it was taken to")
                return (Redeem(event),)
            case Grant():
                return (Send(event.granted),)
            case Deny():
                return self._refuse(event.code, event.reason)
            case Granted():
                return (Joined(event),)
            case Expired():
                raise Untrusted(
                    STRANGER,
                    f"it did not prove its membership within {HELLO_S:.0f} s; ask a member for a ticket",
                )
            case Ended():
                return ()

    def _hello(self, wall_ms: int, proof: bytes | None) -> Hello:
        ours, trust = self._own()
        return Hello(
            network=trust.id,
            nonce=self._nonce,
            chain=ours.chain,
            software=ours.software,
            name=ours.name,
            wall_ms=wall_ms,
            proof=proof,
            secrets=ours.secrets.ids,
        )

    def _own(self) -> tuple[Credentials, Trust]:
        if self._ours is None or self._trust is None:
            raise Untrusted(STRANGER, "this node belongs to no network yet; it can only redeem a ticket")
        return self._ours, self._trust

    def _heard(self, hello: Hello, wall_ms: int) -> tuple[Effect, ...]:
        ours, trust = self._own()
        asking = self.state is State.GREETING
        if hello.network != trust.id:
            raise Untrusted(OTHER_NETWORK, "it belongs to another network; a ticket of this one would let it in")
        # Half the round trip lies between its clock reading and ours; the answerer's one-way reading is rough.
        offset = hello.wall_ms - ((self._sent_ms + wall_ms) // 2 if asking else wall_ms)
        self._same_time(offset, wall_ms)
        standing = trust.check(hello.chain, wall_ms)
        if standing.peer != self._theirs:
            raise Untrusted(STRANGER, f"it shows the certificate of another node, {short(standing.peer)}")
        member = Member(
            peer=self._theirs,
            name=printable(hello.name),
            software=printable(hello.software),
            standing=standing,
            chain=hello.chain,
        )
        secret = self._agree(ours.secrets, hello, asking=asking)
        if asking:
            round_ = Round(trust.id, ours.peer, self._theirs, self._nonce, hello.nonce)
            self._check_proof(hello.proof, round_.proof(secret, "answerer"))
            self._check_secret(member)
            answer = Welcome(wall_ms=wall_ms, proof=round_.proof(secret, "asker"))
            effects: tuple[Effect, ...] = (Trusted(member, offset), Send(answer))
        else:
            round_ = Round(trust.id, self._theirs, ours.peer, hello.nonce, self._nonce)
            effects = (Send(self._hello(wall_ms, round_.proof(secret, "answerer"))),)
            self._sent_ms = wall_ms
        self._round, self._member = round_, member
        return effects

    def _welcomed(self, welcome: Welcome, wall_ms: int) -> tuple[Effect, ...]:
        if self.state is State.CONFIRMING:
            return (MutuallyAdmitted(self._behind),)
        if self._round is None or self._member is None or self._secret is None:
            raise LocalProtocolError("a Welcome was taken before a Hello")
        self._check_proof(welcome.proof, self._round.proof(self._secret.secret, "asker"))
        self._check_secret(self._member)
        offset = welcome.wall_ms - (self._sent_ms + wall_ms) // 2
        return (Trusted(self._member, offset), Send(Welcome(wall_ms=wall_ms)), MutuallyAdmitted(self._behind))

    def _agree(self, ours: Secrets, hello: Hello, *, asking: bool) -> bytes:
        """The secret of this hello: the newest of the answerer that the asker knows."""
        self._secret = ours.first_of(hello.secrets) if asking else ours.first_in(hello.secrets)
        self._behind = ours.present.id not in hello.secrets
        if self._secret is None:
            raise Untrusted(STRANGER, _NO_SECRET)
        return self._secret.secret

    def _check_secret(self, member: Member) -> None:
        """A secret that was replaced may be known to others by now: who proves that one must be an acquaintance."""
        ours, _ = self._own()
        if self._secret != ours.secrets.present and not self._remembers(member.peer, member.chain):
            raise Untrusted(
                STRANGER,
                "it knows only a secret of this network that was replaced, and nobody here has met it before; let it "
                "join with a new ticket",
            )

    def _check_proof(self, given: bytes | None, wanted: bytes) -> None:
        if given is None or not hmac.compare_digest(given, wanted):
            raise Untrusted(STRANGER, _NO_SECRET)

    def _same_time(self, offset_ms: int, wall_ms: int) -> None:
        if abs(offset_ms) > MAX_CLOCK_MS:
            minutes, way = abs(offset_ms) // 60_000, "ahead of" if offset_ms > 0 else "behind"
            raise Untrusted(
                CLOCK,
                f"its clock is {minutes} min {way} the one here ({day(wall_ms)}); set the clocks of both devices",
            )

    def _withdrawals(self, event: Event) -> tuple[bytes, ...]:
        """The signed words that put the peer out: it may have been away when they were passed on."""
        if not isinstance(event, Hello) or self._trust is None:
            return ()
        return self._trust.against(self._theirs, event.chain)[:MAX_PROOFS]

    def _refuse(self, code: str, reason: str, proofs: tuple[bytes, ...] = ()) -> tuple[Effect, ...]:
        text = printable(reason)[:500]
        return (
            Send(Refused(code=code, reason=text, withdrawals=proofs)),
            Rejected(code=code, reason=text, by_us=True),
        )
