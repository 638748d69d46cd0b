"""Pairing by a PIN: the key exchange, both machines, and the wire."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from meshnode.cli.main import main
from protocols.codec import dumps
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId
from protocols.pairing import machine as pairing
from protocols.pairing.machine import (
    Begin,
    Deny,
    Effect,
    Expired,
    Grant,
    Joiner,
    Judged,
    Obtained,
    Opener,
    Rejected,
    Send,
    State,
)
from protocols.pairing.messages import (
    CLOSED,
    CONVERSATION_S,
    MAX_SEALED_BYTES,
    PAIRING,
    WRONG_PIN,
    Ask,
    Message,
    Proof,
    Refused,
    Sealed,
    Share,
)
from tests.adverts import peer_of
from tests.vectors import Case, hold

ANN, BOB, EVE = (PeerId(peer_of(number)) for number in (1, 2, 3))
TICKET = "meshnode1" + "a" * 300


def pair(
    pin: str = "123456", typed: str = "123456", *, opener: PeerId = ANN, between: PeerId | None = None
) -> tuple[Opener, Joiner]:
    """`between`: whose connection the opener sees instead of the joiner's."""
    chance = random.Random(5).randbytes
    return (
        Opener(pin, us=ANN, joiner=between or BOB, now=0.0, random_bytes=chance),
        Joiner(typed, us=BOB, opener=opener, name="kitchen", now=0.0, random_bytes=random.Random(6).randbytes),
    )


def said(effects: tuple[Effect, ...]) -> Message:
    (effect,) = effects
    assert isinstance(effect, Send)
    return PAIRING.decode(PAIRING.encode(effect.message))


def proved(ann: Opener, bob: Joiner) -> Judged:
    share = said(ann.handle(said(bob.handle(Begin(), 0.0)), 0.0))
    (judged,) = ann.handle(said(bob.handle(share, 0.0)), 0.0)
    assert isinstance(judged, Judged)
    return judged


def test_the_ticket_comes_to_who_types_the_pin_and_nobody_can_read_it_on_the_way() -> None:
    ann, bob = pair()
    assert proved(ann, bob) == Judged(True, "kitchen")
    sealed = said(ann.handle(Grant(TICKET), 0.0))
    assert isinstance(sealed, Sealed) and TICKET.encode()[:40] not in sealed.sealed
    assert bob.handle(sealed, 0.0) == (Obtained(TICKET),)
    assert ann.state is bob.state is State.DONE
    assert ann.deadline is bob.deadline is None


def test_a_wrong_pin_gets_nothing() -> None:
    ann, bob = pair(typed="123457")
    assert proved(ann, bob) == Judged(False, "kitchen")
    with pytest.raises(LocalProtocolError, match="has not proved"):
        ann.handle(Grant(TICKET), 0.0)
    refused = said(ann.handle(Deny(WRONG_PIN, "The PIN is wrong."), 0.0))
    assert bob.handle(refused, 0.0) == (Rejected(WRONG_PIN, "The PIN is wrong."),)


@pytest.mark.parametrize(("opener", "between"), [(EVE, None), (ANN, EVE)], ids=["a false opener", "a go-between"])
def test_who_passes_messages_on_under_another_key_gets_nothing(opener: PeerId, between: PeerId | None) -> None:
    """The right PIN on both sides, but one of them talks to another peer than it thinks."""
    ann, bob = pair(opener=opener, between=between)
    assert not proved(ann, bob).right


def test_a_ticket_that_was_sealed_by_who_does_not_know_the_pin_is_refused() -> None:
    ann, bob = pair(pin="000000", typed="123456")
    share = said(ann.handle(said(bob.handle(Begin(), 0.0)), 0.0))
    bob.handle(share, 0.0)
    with pytest.raises(RemoteProtocolError, match="not sealed by who knows the PIN"):
        bob.handle(Sealed(sealed=bytes(24 + 16 + 10)), 0.0)


def test_silence_ends_it() -> None:
    ann, bob = pair()
    bob.handle(Begin(), 0.0)
    assert ann.deadline == bob.deadline == CONVERSATION_S
    (late,) = bob.handle(Expired(), CONVERSATION_S)
    assert isinstance(late, Rejected) and "did not answer within 10 s" in late.reason
    refused = said(ann.handle(Expired(), CONVERSATION_S))
    assert isinstance(refused, Refused) and refused.code == CLOSED


def test_what_comes_out_of_turn_is_refused() -> None:
    messages = (
        Ask(share=bytes(32), name=""),
        Share(share=bytes(32)),
        Proof(proof=bytes(32)),
        Sealed(sealed=b""),
        Refused(code=CLOSED, reason=""),
    )
    for message in messages:
        if not isinstance(message, Ask):
            with pytest.raises(RemoteProtocolError):
                pair()[0].handle(message, 0.0)
        with pytest.raises(RemoteProtocolError):
            pair()[1].handle(message, 0.0)
    with pytest.raises(RemoteProtocolError, match="unknown code"):
        bob = pair()[1]
        bob.handle(Begin(), 0.0)
        bob.handle(Refused(code="because", reason=""), 0.0)


@pytest.mark.parametrize("share", [bytes(32), b"\1" + bytes(31), b"\xff" * 32, b"\2" + bytes(31)])
def test_what_is_no_half_of_an_exchange_is_refused(share: bytes) -> None:
    """The neutral element and elements of small order among them, which would make the key known."""
    with pytest.raises(RemoteProtocolError, match="half of a key exchange"):
        pair()[0].handle(Ask(share=share, name=""), 0.0)


def test_our_own_share_does_not_come_back() -> None:
    _, bob = pair()
    ask = said(bob.handle(Begin(), 0.0))
    assert isinstance(ask, Ask)
    with pytest.raises(RemoteProtocolError):
        bob.handle(Share(share=ask.share), 0.0)


@pytest.mark.parametrize("pin", ["", "12345", "1234567", "12345a", "١٢٣٤٥٦"])
def test_a_pin_has_six_digits(pin: str) -> None:
    with pytest.raises(LocalProtocolError, match="6 digits"):
        pair(typed=pin)


def test_the_specification_shows_the_tables() -> None:
    text = (Path(pairing.__file__).parent / "SPEC.md").read_text()
    rows = set(re.findall(r"^\| (opener|joiner) \| (\w+) \| (\w+) \| (\w+) \|$", text, re.M))
    assert rows == {
        (side, before.value, turn.value, after.value)
        for side, table in (("opener", pairing.OPENER), ("joiner", pairing.JOINER))
        for (before, turn), after in table.items()
    }


def test_vectors() -> None:
    messages: list[Message] = [
        Ask(share=bytes(range(32)), name="kitchen"),
        Share(share=bytes(range(32))),
        Proof(proof=bytes(32)),
        Sealed(sealed=bytes(60)),
        Refused(code=WRONG_PIN, reason="The PIN is wrong."),
    ]
    cases = [Case(type(one).__name__, PAIRING.encode(one), one) for one in messages]
    hold(
        "pairing",
        [
            *cases,
            Case("a share of 31 bytes", dumps({0: 2, 1: bytes(31)})),
            Case("a name that is too long", dumps({0: 1, 1: bytes(32), 2: "a" * 65})),
            Case("a ticket that is too long", dumps({0: 4, 1: bytes(MAX_SEALED_BYTES + 1)})),
            Case("an unknown tag", dumps({0: 6})),
            Case("an unknown even key", dumps({0: 3, 1: bytes(32), 2: 0})),
        ],
        PAIRING.decode,
    )


NOWHERE = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--with", NOWHERE, "12"), "is no PIN"),
        (("--with", "192.168.1.5", "123456"), "is not the address of a node"),
        (("--with", NOWHERE, "123456", "--roles", "serve"), "said where the PIN is shown"),
        (("123456",), "typed on the new device"),
        ((), "There is no node in"),
    ],
)
def test_what_can_not_be_used_is_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    assert main(["pair", *words, "--data", str(tmp_path)]) != 0
    errors = capsys.readouterr().err
    assert sentence in errors and errors.count("\n") == 1
