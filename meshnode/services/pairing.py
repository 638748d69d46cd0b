"""Gives a new device a ticket when somebody types there the PIN that is shown here: protocols/pairing.

Strangers can speak the protocol only while the owner has it open, which ends with the first device that gets a
ticket, the third wrong PIN, or two minutes.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from meshnode.core.errors import Declined
from meshnode.core.log import get_logger
from meshnode.net.message_stream import CLOSE_S, MessageStream
from meshnode.net.port import Host, Stream
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.pairing.machine import Deny, Effect, Event, Expired, Grant, Judged, Opener, RandomBytes, Send
from protocols.pairing.messages import (
    BUSY,
    CLOSED,
    MAX_WRONG,
    OPEN_S,
    PAIRING,
    PIN_DIGITS,
    PROTOCOL,
    WRONG_PIN,
    Message,
)

MAX_CONVERSATIONS: Final = 8  # at the same time: each computes for some milliseconds
TICKET_S: Final = OPEN_S + 60.0  # a ticket that was fetched in the last second is redeemed within a minute

_log = get_logger("pairing")


class Tickets(Protocol):
    """Makes tickets of this node for one device (`membership`)."""

    def make(self, roles: Sequence[str], ttl_s: float) -> str:
        """Raises IdentityError, ConfigError, DiskError."""

    def revoke(self, ticket: str) -> None:
        """Nobody used it, and nobody shall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The device that has got the ticket."""

    peer: PeerId
    name: str


class Pairing:
    """One time that the owner has opened pairing."""

    def __init__(self, pin: str, ticket: str) -> None:
        self.pin: Final = pin
        self.ticket: Final = ticket
        self.wrong = 0
        self.paired: Paired | None = None
        self._over = trio.Event()

    @property
    def is_open(self) -> bool:
        return not self._over.is_set()

    def close(self) -> None:
        """Nobody gets anything from now on."""
        self._over.set()

    async def outcome(self) -> Paired:
        """Wait for the device. Raises Declined `pairing-closed`: nobody came, or with wrong PINs."""
        with trio.move_on_after(OPEN_S):
            await self._over.wait()
        self.close()
        if self.paired is not None:
            return self.paired
        why = (
            f"{MAX_WRONG} wrong PINs were typed, so somebody may be guessing"
            if self.wrong >= MAX_WRONG
            else f"no device came with the right PIN within {OPEN_S:.0f} s"
        )
        raise Declined(CLOSED, f"{why}. Nothing was given away; open pairing again for another PIN: meshnode pair")


class PairingService:
    """Shows a PIN, and gives a ticket to the device on which it is typed."""

    def __init__(self, host: Host, tickets: Tickets, random_bytes: RandomBytes = secrets.token_bytes) -> None:
        """Registers the protocol: make it before `host.run`."""
        self._host = host
        self._tickets = tickets
        self._random = random_bytes
        self._now: Pairing | None = None
        self._talking: set[PeerId] = set()
        host.handle(PROTOCOL, self._answer, open_to_strangers=self._is_open)

    @asynccontextmanager
    async def open(self, roles: Sequence[str] = ()) -> AsyncIterator[Pairing]:
        """Open pairing until the block ends. `roles`: of the new device; none: those of a plain ticket.

        Raises Declined `pairing-busy` (it is open already), and what making a ticket raises.
        """
        if self._now is not None:
            raise Declined(BUSY, "pairing is open on this node already; let that end first, or stop it with Ctrl-C")
        ticket = self._tickets.make(roles, TICKET_S)
        pairing = self._now = Pairing(_pin(self._random), ticket)
        _log.info("pairing.opened")
        try:
            yield pairing
        finally:
            self._now = None
            pairing.close()
            if pairing.paired is None:
                self._tickets.revoke(ticket)
            _log.info("pairing.closed", wrong=pairing.wrong)

    def _is_open(self) -> bool:
        return self._now is not None and self._now.is_open

    async def _answer(self, stream: Stream) -> None:
        """One device's try."""
        pairing, peer = self._now, stream.peer
        if pairing is None or peer in self._talking or len(self._talking) >= MAX_CONVERSATIONS:
            await stream.reset()
            return
        self._talking.add(peer)
        try:
            await self._converse(pairing, MessageStream(stream, PAIRING))
        finally:
            self._talking.discard(peer)

    async def _converse(self, pairing: Pairing, messages: MessageStream[Message]) -> None:
        peer = messages.peer
        machine = Opener(
            pairing.pin, us=self._host.peer_id, joiner=peer, now=trio.current_time(), random_bytes=self._random
        )
        name = ""
        while machine.deadline is not None:
            said: Event | None = Expired()
            with trio.move_on_at(machine.deadline):
                said = await messages.receive()
            if said is None:
                return
            try:
                effects = machine.handle(said, trio.current_time())
            except RemoteProtocolError:
                await messages.reset()
                raise
            for effect in effects:
                if isinstance(effect, Judged):
                    name = effect.name
                    effects = machine.handle(_judge(pairing, effect, peer), trio.current_time())
            await _send(messages, effects)
            if pairing.paired is not None and pairing.paired.peer == peer:
                _log.info("pairing.done", peer=peer, name=name)
        await messages.send_eof()
        with trio.move_on_after(CLOSE_S):
            await messages.receive()  # the other side has read our last word


async def _send(messages: MessageStream[Message], effects: Sequence[Effect]) -> None:
    await messages.send(*(effect.message for effect in effects if isinstance(effect, Send)))


def _judge(pairing: Pairing, judged: Judged, peer: PeerId) -> Grant | Deny:
    """What a proof gets. It is decided in one go, so two devices that come together get one ticket and one no."""
    if not pairing.is_open:
        return Deny(CLOSED, "Pairing was closed in the meantime. Open it again on the other device: meshnode pair")
    if judged.right:
        pairing.paired = Paired(peer=peer, name=judged.name)
        pairing.close()
        return Grant(pairing.ticket)
    pairing.wrong += 1
    left = MAX_WRONG - pairing.wrong
    if left > 0:
        return Deny(WRONG_PIN, f"The PIN is wrong. It can be typed {left} more time{'s' if left > 1 else ''}.")
    pairing.close()
    return Deny(WRONG_PIN, "The PIN is wrong, for the last time: open pairing again on the other device.")


def _pin(random_bytes: Callable[[int], bytes]) -> str:
    """Every PIN is as likely: 64 bits modulo a million favour none by more than one in 10^13."""
    return f"{int.from_bytes(random_bytes(8), 'big') % 10**PIN_DIGITS:0{PIN_DIGITS}}"
