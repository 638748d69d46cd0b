"""A ticket by PIN: the new device's side of /meshnode/pair/1, and the tickets that the other side gives."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Final

import trio

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import ConfigError, Declined, PeerUnreachable
from meshnode.membership.enrolment import DEFAULT_ROLES, create_invite, open_ticket
from meshnode.membership.port import Membership
from meshnode.net.message_stream import MessageStream, open_messages
from meshnode.net.port import Host
from meshnode.state.port import State
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, public_key_of, short
from protocols.multiaddr import parse_address
from protocols.pairing.machine import Begin, Event, Expired, Joiner, Obtained, RandomBytes, Rejected, Send
from protocols.pairing.messages import PAIRING, PIN_DIGITS, PROTOCOL, Message

_PIN: Final = re.compile(rf"[0-9]{{{PIN_DIGITS}}}")


def read_pin(text: str) -> str:
    """Six digits, as people type them. Raises ConfigError."""
    pin = re.sub(r"[\s-]", "", text)
    if not _PIN.fullmatch(pin):
        raise ConfigError(
            f"{text[:20]!r} is no PIN: it has {PIN_DIGITS} digits, which `meshnode pair` shows on the other device"
        )
    return pin


def read_address(text: str) -> tuple[PeerId, str]:
    """Whose address it is, and the address. Raises ConfigError."""
    try:
        address = parse_address(text.strip())
        public_key_of(address.peer)
    except RemoteProtocolError as error:
        raise ConfigError(
            f"{text[:120]!r} is not the address of a node: `meshnode pair` on the other device prints one like "
            "/ip4/192.0.2.1/tcp/4331/p2p/12D3KooW..."
        ) from error
    return PeerId(address.peer), str(address)


async def ticket_by_pin(
    host: Host, address: str, pin: str, *, name: str, random_bytes: RandomBytes = secrets.token_bytes
) -> str:
    """Fetch the ticket from the node at `address`, on which somebody reads the PIN.

    Raises ConfigError (no PIN, no address), PeerUnreachable, Declined (`wrong-pin`, `pairing-closed`: pairing is not
    open there, or not any more).
    """
    digits, (peer, where) = read_pin(pin), read_address(address)
    await host.connect(peer, (where,))
    machine = Joiner(
        digits, us=host.peer_id, opener=peer, name=name, now=trio.current_time(), random_bytes=random_bytes
    )
    try:
        async with open_messages(host, peer, PROTOCOL, PAIRING) as messages:
            return await _converse(messages, machine)
    except RemoteProtocolError as error:
        raise PeerUnreachable(
            f"{short(peer)} does not know the PIN, or breaks the rules of pairing ({error}). Is it the device on "
            "which the PIN is shown?",
            peer=peer,
        ) from error
    except Declined as no:
        if no.code not in ("stranger", "not-served"):
            raise
        raise Declined(
            "pairing-closed",
            f"{short(peer)} lets nobody in by a PIN now. Open pairing there: meshnode pair",
            peer=peer,
        ) from no


async def _converse(messages: MessageStream[Message], machine: Joiner) -> str:
    event: Event = Begin()
    while True:
        for effect in machine.handle(event, trio.current_time()):
            match effect:
                case Send(message):
                    await messages.send(message)
                case Obtained(ticket):
                    return ticket
                case Rejected(code, reason):
                    raise Declined(code, reason, peer=messages.peer)
        event = Expired()
        with trio.move_on_at(machine.deadline or trio.current_time()):
            event = await messages.expect()


class PairingTickets:
    """`Tickets` of services/pairing.py: lines in the ledger of this node, for one device each."""

    def __init__(
        self, membership: Membership, state: State, addresses: Callable[[], Sequence[str]], wall: Wall = wall_ms
    ) -> None:
        self._membership = membership
        self._state = state
        self._addresses = addresses
        self._wall = wall

    def make(self, roles: Sequence[str], ttl_s: float) -> str:
        """Raises what `create_invite` raises."""
        return create_invite(
            self._membership,
            self._state,
            roles=roles or DEFAULT_ROLES,
            uses=1,
            ttl_s=ttl_s,
            addresses=self._addresses(),
            clock=self._wall,
        )

    def revoke(self, ticket: str) -> None:
        """Nobody used it, and nobody shall."""
        self._state.revoke_invite(open_ticket(ticket).invite, self._wall())
