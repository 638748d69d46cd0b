"""Entering a network with a ticket: the joiner's side of /meshnode/hello/1."""

from __future__ import annotations

from pathlib import Path

import trio

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import Declined, IdentityError, PeerUnreachable
from meshnode.membership.enrolment import open_ticket, own_standing
from meshnode.membership.network import has_network, load_network, save_network
from meshnode.membership.port import Membership
from meshnode.net.message_stream import CLOSE_S, MessageStream, open_messages
from meshnode.net.port import Host
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership import Ticket, Trust, network_id, open_network
from protocols.membership.machine import BeginJoin, HelloMachine, Joined, Rejected
from protocols.membership.messages import (
    FORBIDDEN,
    HELLO,
    HELLO_S,
    NONCE_BYTES,
    PROTOCOL,
    Granted,
    Join,
    Message,
)
from protocols.membership.renewal import open_renewal
from protocols.membership.sealing import open_secret
from protocols.membership.trust import day


async def join(
    host: Host,
    ticket_text: str,
    *,
    folder: Path,
    name: str,
    software: str,
    anew: bool = False,
    clock: Wall = wall_ms,
) -> Membership:
    """Redeem a ticket over a running host and keep the membership in the data folder.

    A node that is a member of this network already, with the roles of the ticket, keeps what it has; unless `anew`,
    because it was put out, say: then it gets what the ticket gives, and no more.

    Raises:
      IdentityError: no ticket, or the folder belongs to another network.
      Declined: the issuer said no (invite-expired, invite-used, forbidden, clock, ...), with its sentence.
      PeerUnreachable: nobody at the ticket's addresses answers.
    If cancelled: the ticket may have been used; the same node may redeem it again.
    """
    ticket = open_ticket(ticket_text)
    known = _known(folder, ticket, host.peer_id, clock())
    if known is not None and not anew:
        return known
    # The issuer's clock decides about expiry; ours is asked only when the issuer can't be.
    failures: list[str] = []
    for peer, addresses in ticket.peers().items():
        if peer == host.peer_id:
            continue
        try:
            granted = await _redeem(host, peer, addresses, ticket, name, software, clock)
        except PeerUnreachable as error:
            failures.append(str(error))
        except Declined as error:
            # Another member that the ticket names need not hold the issuer's ledger.
            if peer == ticket.issuer or error.code != FORBIDDEN:
                raise
            failures.append(f"{short(peer)}: {error}")
        else:
            membership = _checked(granted, ticket, host.peer_id, name, clock())
            save_network(folder, membership)
            return membership
    if ticket.expires_ms and ticket.expires_ms <= clock():
        raise Declined("invite-expired", f"the ticket expired on {day(ticket.expires_ms)}; ask for a new one")
    if not failures:
        raise IdentityError("this ticket was made by this very node; use it on another device")
    raise PeerUnreachable(
        f"the node that made the ticket can't be reached. Is meshnode running there, and is its address right? "
        "If it listens elsewhere than when it made the ticket, make a new one there: meshnode invite "
        f"({'; '.join(failures)})",
        peer=PeerId(ticket.issuer),
    )


def _known(folder: Path, ticket: Ticket, peer: PeerId, now_ms: int) -> Membership | None:
    if not has_network(folder):
        return None
    membership = load_network(folder)
    if membership.network_id != ticket.network:
        raise IdentityError(
            f"this node belongs to the network {membership.network.name!r} ({membership.network_id}) already; the "
            f"ticket is of {ticket.name!r}. Choose another data folder with --data to enter a second network."
        )
    try:
        standing = own_standing(membership, membership.trust(), now_ms, peer)
    except IdentityError:
        return None  # expired, or of an earlier key: the ticket gives a new certificate
    return membership if standing.roles >= set(ticket.roles) else None


async def _redeem(
    host: Host, peer: PeerId, addresses: tuple[str, ...], ticket: Ticket, name: str, software: str, clock: Wall
) -> Granted:
    await host.connect(peer, addresses)
    try:
        async with open_messages(host, peer, PROTOCOL, HELLO) as messages:
            return await _converse(messages, ticket, name, software, clock)
    except RemoteProtocolError as error:
        raise PeerUnreachable(f"{short(peer)} answered the ticket with nonsense: {error}", peer=peer) from error
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            await host.disconnect(peer, "the ticket was redeemed")  # a member comes back on a new connection


async def _converse(
    messages: MessageStream[Message], ticket: Ticket, name: str, software: str, clock: Wall
) -> Granted:
    machine = HelloMachine(
        theirs=messages.peer, credentials=None, trust=None, nonce=bytes(NONCE_BYTES), now=trio.current_time()
    )
    order = Join(
        network=ticket.network,
        invite=ticket.invite,
        secret=ticket.secret,
        name=name[:64],
        software=software[:32],
        wall_ms=clock(),
    )
    machine.handle(BeginJoin(order), trio.current_time(), clock())
    await messages.send(order)
    await messages.send_eof()
    while True:
        with trio.move_on_after(HELLO_S) as scope:
            said = await messages.expect()
        if scope.cancelled_caught:
            raise PeerUnreachable(
                f"{short(messages.peer)} did not answer the ticket within {HELLO_S:.0f} s", peer=messages.peer
            )
        for effect in machine.handle(said, trio.current_time(), clock()):
            if isinstance(effect, Joined):
                return effect.granted
            if isinstance(effect, Rejected):
                raise Declined(effect.code, effect.reason, peer=messages.peer)


def _checked(granted: Granted, ticket: Ticket, peer: PeerId, name: str, now_ms: int) -> Membership:
    """What was granted, judged by the founders that the ticket names, not by the node that answered."""
    try:
        network = open_network(granted.network)
        if network_id(network) != ticket.network or network.founders != ticket.founders:
            raise RemoteProtocolError("it is of another network than the ticket")
        standing = Trust(network).check(granted.chain, now_ms)
        if standing.peer != peer:
            raise RemoteProtocolError(f"its certificate is of {short(standing.peer)}")
        secret = open_secret(granted.sealed, invite=ticket.invite, invite_secret=ticket.secret, joiner=peer)
        if granted.renewal:
            open_renewal(granted.renewal, secret, Trust(network), now_ms)
    except RemoteProtocolError as error:
        raise IdentityError(f"the answer to the ticket does not hold: {error}. Ask for a new ticket.") from error
    return Membership(
        network_record=granted.network,
        secret=secret,
        chain=granted.chain,
        name=name[:64],
        renewal=granted.renewal,
    )
