"""Membership against anything: any event order, any bytes, any set of withdrawals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.membership import HELLO, ROLES, HelloMachine, Standing, Ticket, Untrusted, format_ticket, parse_ticket
from protocols.membership import machine as hello
from protocols.membership.messages import MAX_MESSAGE_BYTES, SEALED_BYTES, Granted, Hello, Join, Welcome
from protocols.membership.renewal import id_of
from tests.unit.membership_actors import NOW_MS, World, peer_of_key
from tests.wire import messages

W = World()
OTHER = World(founder="mallory")
ANN, BOB = W.credentials("ann"), W.credentials("ann", "bob")
GRANTED = Granted(network=W.network_record, chain=W.chain("bob"), sealed=bytes(SEALED_BYTES), wall_ms=NOW_MS)
JOIN = Join(network=W.trust().id, invite=bytes(16), secret=bytes(16), name="n", software="s", wall_ms=NOW_MS)


def machine_of(credentials: Any = ANN, theirs: Any = BOB) -> HelloMachine:
    return HelloMachine(theirs=theirs.peer, credentials=credentials, trust=W.trust(), nonce=b"n" * 16, now=0.0)


EVENTS = st.one_of(
    st.sampled_from(
        [
            hello.Begin(),
            hello.Ended(),
            hello.Expired(),
            hello.Grant(GRANTED),
            hello.Deny("forbidden", "no"),
            hello.BeginJoin(JOIN),
            JOIN,
        ]
    ),
    *(messages(cls) for cls in HELLO),
    st.builds(
        Hello,
        network=st.just(W.trust().id),
        nonce=st.just(b"x" * 16),
        chain=st.just(BOB.chain),
        software=st.just(""),
        name=st.just(""),
        wall_ms=st.just(NOW_MS),
        secrets=st.sampled_from([(), (id_of(W.secret),), (b"unknown!", id_of(W.secret))]),
    ),
)


@given(st.lists(EVENTS, max_size=8))
@settings(max_examples=300)
def test_any_order_of_events_admits_nobody_without_proof(events: list[Any]) -> None:
    machine = machine_of()
    for event in events:
        before = (machine.state, machine.deadline)
        try:
            effects = machine.handle(event, 0.0, NOW_MS)
        except (LocalProtocolError, RemoteProtocolError):
            assert (machine.state, machine.deadline) == before
            continue
        assert not any(isinstance(effect, (hello.Trusted, hello.MutuallyAdmitted)) for effect in effects)
        assert (machine.deadline is None) == (machine.state in hello.CLOSED)
        if before[0] in (hello.State.REFUSED, hello.State.GRANTED):
            assert machine.state is before[0]


class HelloStream:
    """Bytes in, bytes and facts out, as the runtime drives a machine from a stream."""

    def __init__(self, machine: HelloMachine) -> None:
        self.machine = machine
        self._reader = FrameReader(max_header=MAX_MESSAGE_BYTES, max_body=0)

    def begin(self) -> bytes:
        return self._split(self.machine.handle(hello.Begin(), 0.0, NOW_MS))[0]

    def receive(self, data: bytes) -> tuple[bytes, list[hello.Effect]]:
        out, facts = b"", []
        for frame in self._reader.feed(data):
            more, new = self._split(self.machine.handle(HELLO.decode(frame.header), 0.0, NOW_MS))
            out, facts = out + more, facts + new
        return out, facts

    @staticmethod
    def _split(effects: tuple[hello.Effect, ...]) -> tuple[bytes, list[hello.Effect]]:
        out = b"".join(pack(HELLO.encode(effect.message)) for effect in effects if isinstance(effect, hello.Send))
        return out, [effect for effect in effects if not isinstance(effect, hello.Send)]


def conversation() -> list[bytes]:
    """The bytes of a good hello, as the asker sends them."""
    asker, answerer = HelloStream(machine_of()), HelloStream(machine_of(BOB, ANN))
    first = asker.begin()
    reply, _ = answerer.receive(first)
    second, _ = asker.receive(reply)
    return [first, second]


GOOD = conversation()


@given(st.integers(0, len(b"".join(GOOD)) * 8 - 1), st.integers(1, 97))
@settings(max_examples=300)
def test_one_flipped_bit_anywhere_admits_nobody_unless_it_changes_nothing_that_is_proven(bit: int, step: int) -> None:
    data = bytearray(b"".join(GOOD))
    data[bit // 8] ^= 1 << bit % 8
    answerer = HelloStream(machine_of(BOB, ANN))
    facts: list[object] = []
    try:
        for start in range(0, len(data), step):
            facts += answerer.receive(bytes(data[start : start + step]))[1]
    except RemoteProtocolError:
        return
    # Name, software and clock are said, not proven; what counts is that the member is really the one that asked.
    for fact in facts:
        if isinstance(fact, hello.Trusted):
            assert (fact.member.peer, fact.member.chain) == (ANN.peer, ANN.chain)


@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
@settings(max_examples=200)
def test_a_session_survives_any_bytes(chunks: list[bytes], framed: bool) -> None:
    session = HelloStream(machine_of())
    session.begin()
    for chunk in chunks:
        data = len(chunk).to_bytes(4, "big") + bytes(4) + chunk if framed else chunk
        try:
            session.receive(data)
        except RemoteProtocolError:
            break


@given(st.lists(st.sampled_from([Welcome(wall_ms=NOW_MS), JOIN]), min_size=1, max_size=60))
@settings(max_examples=50)
def test_a_flood_of_messages_is_cut_off(flood: list[Any]) -> None:
    session = HelloStream(machine_of())
    with pytest.raises(RemoteProtocolError):
        session.receive(b"".join(pack(HELLO.encode(message)) for message in [Welcome(wall_ms=1), *flood]))


TICKETS = st.builds(
    Ticket,
    network=st.just(W.trust().id),
    name=st.text(st.characters(categories=["L", "N"]), max_size=64),
    founders=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=3).map(tuple),
    issuer=st.just(ANN.peer),
    addresses=st.lists(
        st.builds(lambda port: f"/ip4/10.0.0.1/tcp/{port}/p2p/{ANN.peer}", st.integers(1, 65535)), max_size=16
    ).map(tuple),
    invite=st.binary(min_size=16, max_size=16),
    secret=st.binary(min_size=16, max_size=16),
    roles=st.sampled_from([(), ("serve",), ROLES]),
    uses=st.integers(0, 9),
    expires_ms=st.integers(0, 1 << 62),
)


@given(TICKETS)
@settings(max_examples=60)
def test_any_ticket_survives_its_text(ticket: Ticket) -> None:
    text = format_ticket(ticket)
    assert parse_ticket(text) == ticket
    for at in range(9, len(text)):
        with pytest.raises(RemoteProtocolError):
            parse_ticket(text[:at])


GLUE = st.text("\u200b\ufeff\u00ad\u00a0 \t\r\n>|\"'`*_=,;", max_size=6)
PROSE_WORDS = ["Hi!", "ticket:", "run this", "meshnode join", "and then start it.", "7", "=>"]
PROSE = st.lists(st.sampled_from(PROSE_WORDS)).map(" ".join)


@given(TICKETS, PROSE, PROSE, st.lists(st.tuples(st.integers(1, 2000), GLUE), max_size=8), st.booleans())
@settings(max_examples=100)
def test_any_ticket_survives_being_pasted(
    ticket: Ticket, before: str, after: str, breaks: list[tuple[int, str]], upper: bool
) -> None:
    """Broken anywhere by what is no letter, in the middle of a message."""
    text = format_ticket(ticket)
    for at, glue in breaks:
        text = text[: at % len(text)] + glue + text[at % len(text) :]
    text = text.upper() if upper else text
    assert parse_ticket(f"{before} {text} {after}") == ticket


@given(
    st.text(max_size=400) | st.text("abcdefghijklmnopqrstuvwxyz234567", max_size=400).map(lambda t: "meshnode1" + t)
)
@settings(max_examples=200)
def test_any_other_text_is_no_ticket(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_ticket(text)


PEOPLE = ("ann", "bob", "cleo")
WITHDRAWALS = [
    W.withdrawal(subject, by=by, chain=chain, keeps=keeps, issued_ms=NOW_MS + time)
    for subject in PEOPLE
    for by, chain in (
        ("founder", ()),
        ("ann", W.chain("ann")),
        ("bob", W.chain("ann", "bob")),
        ("bob", W.chain("bob")),
    )
    for keeps in ((), ("serve", "invite"))
    for time in (0, 5)
]
CHAINS = [
    W.chain("ann"),
    W.chain("bob"),
    W.chain("ann", "bob"),
    W.chain("ann", "cleo"),
    W.chain("ann", "bob", "cleo"),
]


def verdicts(records: list[bytes]) -> list[Standing | str]:
    trust = W.trust()
    for record in records:
        trust.withdraw(record, NOW_MS + 1000)
    out: list[Standing | str] = []
    for chain in CHAINS:
        try:
            out.append(trust.check(chain, NOW_MS + 1000))
        except Untrusted as no:
            out.append(f"{no.code}: {no}")
    return out


@given(st.lists(st.sampled_from(WITHDRAWALS), max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_all_nodes_that_know_the_same_withdrawals_agree(records: list[bytes], rng: Any) -> None:
    shuffled = list(records)
    rng.shuffle(shuffled)
    assert verdicts(records) == verdicts(shuffled) == verdicts(records + shuffled)


@given(st.lists(st.sampled_from([*W.chain("ann", "bob", "cleo"), *OTHER.chain("ann", "bob")]), max_size=4))
@settings(max_examples=100)
def test_only_whole_chains_hold(certificates: list[bytes]) -> None:
    whole = W.chain("ann", "bob", "cleo")
    holds = 0 < len(certificates) <= 3 and tuple(certificates) == whole[: len(certificates)]
    try:
        standing = W.trust().check(certificates, NOW_MS)
    except Untrusted:
        assert not holds
    else:
        assert holds and standing.peer == peer_of_key(PEOPLE[len(certificates) - 1])


def test_a_proof_belongs_to_one_pair_and_one_round() -> None:
    first, second = GOOD
    answerer = HelloStream(
        HelloMachine(theirs=ANN.peer, credentials=BOB, trust=W.trust(), nonce=b"another nonce..."[:16], now=0.0)
    )
    answerer.receive(first)
    answerer.receive(second)
    assert answerer.machine.state is hello.State.REFUSED
    elsewhere = HelloStream(machine_of(W.credentials("dan"), ANN))
    elsewhere.receive(first)
    elsewhere.receive(second)
    assert elsewhere.machine.state is hello.State.REFUSED
