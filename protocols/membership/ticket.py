"""A ticket: the text that lets one more device in. Whoever holds it can use it; it is a secret.

`meshnode1` + base32 (lower case, no padding) of canonical CBOR and a checksum of four bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import unicodedata
from dataclasses import dataclass
from typing import Final

from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, public_key_of, short
from protocols.membership.messages import INVITE_BYTES, INVITE_SECRET_BYTES, ROLES
from protocols.membership.trust import day

PREFIX: Final = "meshnode1"
MAX_TICKET: Final = 8192  # characters
MAX_TEXT: Final = 65_536  # characters in which a ticket is looked for
MAX_STARTS: Final = 16  # places in a text at which one may begin
_CHECK_BYTES: Final = 4
_CONTEXT: Final = b"meshnode/ticket/1"
_WORD: Final = re.compile(r"[a-z0-9]+")
# What programs put around text: tags of HTML, colours of a terminal.
_MARKUP: Final = re.compile(r"<[A-Za-z/][^<>]{0,200}>|\x1b\[[0-9;]*[A-Za-z]")

_NO_CHARACTER: Final = re.compile(r"&#[0-9]{8,}")  # Python reads no number of 5,000 digits


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
    """Find the one ticket in a text, as people copy it: in several lines, quoted, in quotation marks, with characters
    that nobody sees, in capitals, in the middle of a message.

    Raises:
      RemoteProtocolError: no ticket, a damaged one, more than one, or with an address or role that makes no sense.
    """
    if len(text) > MAX_TEXT:
        raise RemoteProtocolError(f"a text of {len(text)} characters is too long to look for a ticket in it")
    pieces = _pieces(text)
    starts = [at for at in range(len(pieces)) if _begins(pieces, at)]
    if not starts:
        shown = "".join(pieces)[:12]
        raise RemoteProtocolError(f"this is no ticket: a ticket starts with {PREFIX!r}, not with {shown!r}")
    found = {payload for at in starts[:MAX_STARTS] if (payload := _whole(pieces, at)) is not None}
    if not found:
        raise RemoteProtocolError("the ticket is damaged or not complete: copy it again as a whole")
    if len(found) > 1:
        raise RemoteProtocolError(f"the text holds {len(found)} tickets; give one of them")
    return _checked(found.pop())


def _pieces(text: str) -> list[str]:
    """The words of a text, in small letters: a ticket is one, or several that were one before it was broken."""
    readable = html.unescape(_NO_CHARACTER.sub(" ", text))
    plain = unicodedata.normalize("NFKC", _MARKUP.sub(" ", readable)).lower()
    return _WORD.findall("".join(c for c in plain if unicodedata.category(c) != "Cf"))


def _begins(pieces: list[str], at: int) -> bool:
    """Whether a ticket begins with this piece, which may be less than the prefix."""
    head = ""
    while at < len(pieces) and len(head) < len(PREFIX):
        head += pieces[at]
        at += 1
        if not PREFIX.startswith(head[: len(PREFIX)]):
            return False
    return head.startswith(PREFIX)


def _whole(pieces: list[str], at: int) -> bytes | None:
    """The payload of the ticket that begins here, and ends with the piece that makes its checksum right; or None."""
    plain = ""
    for piece in pieces[at:]:
        plain += piece
        if len(plain) > MAX_TICKET:
            return None
        body = plain[len(PREFIX) :]
        if len(body) % 8 in (1, 3, 6):  # no bytes have so many letters
            continue
        try:
            data = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
        except ValueError:
            return None  # a letter that no ticket has
        payload, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        spelled = base64.b32encode(data).decode("ascii").lower().rstrip("=")
        if spelled == body and check == _checksum(payload):
            return payload
    return None


def _checked(payload: bytes) -> Ticket:
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
