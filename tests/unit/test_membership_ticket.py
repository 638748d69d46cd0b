"""The text of a ticket."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.errors import RemoteProtocolError
from protocols.membership import Ticket, describe, format_ticket, network_id, parse_ticket
from protocols.membership.ticket import PREFIX
from tests.unit.membership_actors import NOW_MS, World, peer_of_key

W = World()
ANN = peer_of_key("ann")
TICKET = Ticket(
    network=network_id(W.network),
    name="home",
    founders=W.network.founders,
    issuer=ANN,
    addresses=(f"/ip4/192.0.2.7/tcp/4331/p2p/{ANN}", f"/dns/boot.example/tcp/4331/p2p/{peer_of_key('boot')}"),
    invite=bytes(range(16)),
    secret=bytes(range(100, 116)),
    roles=("serve", "publish"),
    expires_ms=NOW_MS,
)


def test_a_ticket_survives_copying() -> None:
    text = format_ticket(TICKET)
    assert text.startswith(PREFIX)
    assert text.isascii() and text == text.lower()
    assert parse_ticket(text) == TICKET
    wrapped = "\n".join(text[i : i + 60] for i in range(0, len(text), 60))
    assert parse_ticket(f"  {wrapped.upper()}\r\n") == TICKET


def wrapped(text: str, width: int, glue: str) -> str:
    return glue.join(text[i : i + width] for i in range(0, len(text), width))


TEXT = format_ticket(TICKET)
# As people copy it.
COPIED: dict[str, str] = {
    "as it is": TEXT,
    "lines": wrapped(TEXT, 60, "\n"),
    "lines of Windows, with a byte order mark": "\ufeff" + wrapped(TEXT, 76, "\r\n") + "\r\n",
    "single letters": wrapped(TEXT, 1, " "),
    "broken inside its first word": TEXT[:4] + "\n" + TEXT[4:],
    "quoted in a mail": "> " + wrapped(TEXT, 60, "\n> "),
    "quoted twice": ">> " + wrapped(TEXT, 60, "\n>> "),
    "quoted in HTML": "&gt; " + wrapped(TEXT, 60, "<br>\n&gt; "),
    "quotation marks": f'"{TEXT}"',
    "typographic quotation marks": f"\u201c{TEXT}\u201d",
    "code in a chat": f"```\n{TEXT}\n```",
    "bold": f"**{TEXT}**",
    "zero-width spaces": wrapped(TEXT, 10, "\u200b"),
    "soft hyphens and direction marks": "\u202a" + wrapped(TEXT, 33, "\u00ad") + "\u202c",
    "hard spaces": wrapped(TEXT, 20, "\u00a0"),
    "soft line breaks of mail": wrapped(TEXT, 75, "=\r\n"),
    "a coloured terminal": f"\x1b[1;32m{TEXT}\x1b[0m",
    "capitals, wide": TEXT.upper().translate({ord(c): ord(c) + 0xFEE0 for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"}),
    "the whole command": f"    meshnode join {TEXT}\n",
    "what invite prints": f"On the next device, within 24 hours:\n\n    meshnode join {TEXT}\n\nand then start it\n",
    "a message": f"Hi! Here is it: {TEXT}. Start the node after that, and tell me",
    "an address": f"https://chat.example/?t={TEXT}&x=1",
    "twice": f"{TEXT}\n{wrapped(TEXT, 40, ' ')}",
    "after one that is cut off": f"{TEXT[:-9]}\nsorry, again:\n{TEXT}",
}


@pytest.mark.parametrize("copied", COPIED)
def test_a_ticket_survives_being_pasted(copied: str) -> None:
    assert parse_ticket(COPIED[copied]) == TICKET


def test_of_two_tickets_none_is_guessed() -> None:
    other = format_ticket(replace(TICKET, invite=bytes(16)))
    with pytest.raises(RemoteProtocolError, match="2 tickets; give one"):
        parse_ticket(f"{TEXT}\n{other}")


def test_a_number_without_end_is_no_character() -> None:
    with pytest.raises(RemoteProtocolError, match="no ticket"):
        parse_ticket("&#" + "9" * 5000)
    assert parse_ticket(f"&#{'9' * 5000}; {TEXT}") == TICKET


def test_a_text_without_end_is_refused_soon() -> None:
    for text in ("x" * 70_000, "meshnode1 " * 6_000, "m " * 30_000, "meshnode1" + " a" * 30_000, "<a" * 30_000):
        with pytest.raises(RemoteProtocolError):
            parse_ticket(text)


@pytest.mark.parametrize("place", range(0, 200, 7))
def test_one_wrong_character_is_found(place: int) -> None:
    text = format_ticket(TICKET)
    at = len(PREFIX) + place
    wrong = text[:at] + ("a" if text[at] != "a" else "b") + text[at + 1 :]
    with pytest.raises(RemoteProtocolError, match="damaged"):
        parse_ticket(wrong)


@pytest.mark.parametrize("text", ["", "hello", "meshnode2abc", "x" * 20_000, PREFIX + "é"])
def test_what_is_no_ticket(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_ticket(text)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(TICKET, issuer="12D3nobody"),
        replace(TICKET, founders=()),
        replace(TICKET, roles=("king",)),
        replace(TICKET, addresses=("/ip4/192.0.2.7/tcp/4331",)),
        replace(TICKET, name="ho\x1b[31mme"),
    ],
)
def test_a_ticket_that_makes_no_sense(wrong: Ticket) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_ticket(format_ticket(wrong))


def test_addresses_are_grouped_by_peer_the_issuer_first() -> None:
    peers = replace(TICKET, addresses=TICKET.addresses[::-1]).peers()
    assert list(peers) == [ANN, peer_of_key("boot")]
    assert peers[ANN] == TICKET.addresses[:1]


def test_words_for_a_ticket_never_show_its_secret() -> None:
    text = describe(TICKET, NOW_MS - 1)
    assert "'home'" in text and "one device" in text and "valid until 2023-11-14" in text and "serve, publish" in text
    assert "expired on" in describe(TICKET, NOW_MS)
    assert "any number of devices, does not expire" in describe(replace(TICKET, uses=0, expires_ms=0), NOW_MS)
    for shown in (text, repr(TICKET)):
        assert TICKET.secret.hex() not in shown
        assert repr(TICKET.secret) not in shown
