"""A ticket: the text that lets one more device in. Whoever holds it can use it; it is a secret.

`meshnode1` + base32 (lower case, no padding) of canonical CBOR and a checksum of four bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, public_key_of, short
from protocols.membership.messages import INVITE_BYTES, INVITE_SECRET_BYTES, ROLES
from protocols.membership.trust import day

PREFIX: Final = "meshnode1"
MAX_TICKET: Final = 8192  # characters
_CHECK_BYTES: Final = 4
_CONTEXT: Final = b"meshnode/ticket/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    network: str = at(1, limit=32)
    name: str = at(2, limit=64)  # of the network
    founders: tuple[bytes, ...] = at(3, limit=8, size=32)
    issuer: str = at(4, limit=64)  # peer id of the node that keeps the invite
    addresses: tuple[str, ...] = at(5, limit=16)  # multiaddrs with /p2p/<peer id>; the issuer's first
    invite: bytes = at(6, size=INVITE_BYTES)
    secret: bytes = at(7, size=INVITE_SECRET_BYTES)
    roles: tuple[str, ...] = at(8, limit=8)
    uses: int = at(9, default=1)  # 0: any number
    expires_ms: int = at(10, default=0)  # UTC milliseconds; 0: never

    def __repr__(self) -> str:
        return f"Ticket(network={self.network!r}, invite={self.invite.hex()})"  # never the secret

    def peers(self) -> dict[PeerId, tuple[str, ...]]:
        """Addresses by the peer they lead to, the issuer first."""
        out: dict[PeerId, tuple[str, ...]] = {PeerId(self.issuer): ()}
        for address in self.addresses:
            peer = peer_of(address)
            out[peer] = (*out.get(peer, ()), address)
        return {peer: addresses for peer, addresses in out.items() if addresses}


def peer_of(address: str) -> PeerId:
    """The peer id at the end of a multiaddr. Raises RemoteProtocolError when there is none."""
    head, mark, peer = address.rpartition("/p2p/")
    if not mark or not head.startswith("/"):
        raise RemoteProtocolError(f"the address {address!r} does not end in /p2p/<peer id>")
    public_key_of(peer)
    return PeerId(peer)


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(_CONTEXT + payload).digest()[:_CHECK_BYTES]


def format_ticket(ticket: Ticket) -> str:
    """The text of a ticket. Raises LocalProtocolError when a field breaks its limit."""
    payload = encode(ticket)
    return PREFIX + base64.b32encode(payload + _checksum(payload)).decode("ascii").lower().rstrip("=")


def parse_ticket(text: str) -> Ticket:
    """Read a ticket; white space, line breaks and case of a copied text do not matter.

    Raises:
      RemoteProtocolError: no ticket, damaged, or with an address or role that makes no sense.
    """
    if len(text) > 2 * MAX_TICKET:
        raise RemoteProtocolError(f"a text of {len(text)} characters is no ticket")
    plain = re.sub(r"\s+", "", text).lower()
    if not plain.startswith(PREFIX):
        raise RemoteProtocolError(f"this is no ticket: a ticket starts with {PREFIX!r}, not with {plain[:12]!r}")
    body = plain[len(PREFIX) :]
    if len(plain) > MAX_TICKET:
        raise RemoteProtocolError(f"a ticket of {len(plain)} characters; the limit is {MAX_TICKET}")
    try:
        data = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
    except ValueError as error:
        raise RemoteProtocolError("the ticket is damaged: copy it again as a whole") from error
    payload, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    spelled = base64.b32encode(data).decode("ascii").lower().rstrip("=")
    if spelled != body or check != _checksum(payload):
        raise RemoteProtocolError("the ticket is damaged (its checksum is wrong): copy it again as a whole")
    ticket = decode(Ticket, payload)
    public_key_of(ticket.issuer)
    for address in ticket.addresses:
        peer_of(address)
    if not ticket.founders or set(ticket.roles) - set(ROLES) or not ticket.name.isprintable():
        raise RemoteProtocolError("the ticket names no founder, an unknown role, or a network that can't be shown")
    return ticket


def describe(ticket: Ticket, wall_ms: int) -> str:
    """A ticket in words, without its secret. `wall_ms`: UTC time now."""
    uses = {0: "any number of devices", 1: "one device"}.get(ticket.uses, f"{ticket.uses} devices")
    if not ticket.expires_ms:
        until = "does not expire"
    elif ticket.expires_ms <= wall_ms:
        until = f"expired on {day(ticket.expires_ms)}"
    else:
        until = f"valid until {day(ticket.expires_ms)}"
    hosts = ", ".join(address.rpartition("/p2p/")[0] for address in ticket.addresses) or "no address"
    return (
        f"A ticket to the network {ticket.name!r} ({ticket.network}) for {uses}, {until}.\n"
        f"Roles: {', '.join(ticket.roles) or 'none'}. Issued by {short(ticket.issuer)} at {hosts}."
    )
