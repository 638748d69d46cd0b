from __future__ import annotations

import pytest

from protocols.codec import dumps
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import public_key_of
from protocols.sync.machine import TRANSITIONS, Finished, Key, Send, State, SyncMachine, Take, Version
from protocols.sync.messages import (
    MAX_ENTRIES,
    MAX_MESSAGE_BYTES,
    MAX_PAGE_ENTRIES,
    MAX_RECORDS_BYTES,
    SYNC,
    Digest,
    Held,
    Item,
    Message,
    Name,
    Records,
    Wanted,
)
from tests.adverts import peer_of
from tests.vectors import PROTOCOLS, Case, hold

Snapshot = dict[Key, tuple[Version, bytes]]


def machine_of(held: Snapshot, *, asking: bool, age_s: float = 0.0) -> SyncMachine:
    return SyncMachine(
        {key: version for key, (version, _) in held.items()},
        {key: (record, age_s) for key, (_, record) in held.items()},
        asking=asking,
    )


def converse(asker: SyncMachine, answerer: SyncMachine) -> tuple[list[bytes], list[bytes], list[Message]]:
    """Run both sides to the end: records that the asker got, that the answerer got, all messages."""
    got: dict[SyncMachine, list[bytes]] = {asker: [], answerer: []}
    messages: list[Message] = []
    queue = [(answerer, effect) for effect in asker.begin()]
    while queue:
        side, effect = queue.pop(0)
        assert isinstance(effect, Send)
        messages.append(effect.message)
        for reply in side.handle(SYNC.decode(SYNC.encode(effect.message))):
            if isinstance(reply, Send):
                queue.append((asker if side is answerer else answerer, reply))
            elif isinstance(reply, Take):
                got[side].append(reply.record)
    assert asker.done
    assert answerer.done
    return got[asker], got[answerer], messages


def key(number: int, domain: str = "advert") -> Key:
    return domain, peer_of(number)


def name(number: int, domain: str = "advert") -> Name:
    return Name(domain=domain, signer=public_key_of(peer_of(number)))


def test_each_gets_what_it_lacks_and_nothing_else() -> None:
    asker = machine_of({key(1): ((1, 1), b"a1"), key(2): ((1, 5), b"a2 new"), key(3): ((1, 1), b"a3")}, asking=True)
    answerer = machine_of(
        {key(2): ((1, 4), b"a2 old"), key(3): ((1, 1), b"a3"), key(3, "head"): ((2, 1), b"h3")}, asking=False
    )
    to_asker, to_answerer, messages = converse(asker, answerer)
    assert to_asker == [b"h3"]
    assert sorted(to_answerer) == [b"a1", b"a2 new"]
    assert [type(m) for m in messages] == [Digest, Records, Wanted, Records]


def test_two_empty_sides_and_two_equal_ones_say_little() -> None:
    for held in ({}, {key(1): ((1, 1), b"a")}):
        got = converse(machine_of(held, asking=True), machine_of(held, asking=False))
        assert got[:2] == ([], [])
        assert len(got[2]) == 4


def test_hundreds_of_records_travel_in_pages() -> None:
    mine = {key(n): ((1, 1), b"%04d" % n * 200) for n in range(1, 601)}
    theirs = {key(n, "head"): ((1, 1), b"%04d" % n * 200) for n in range(1, 601)}
    to_asker, to_answerer, messages = converse(machine_of(mine, asking=True), machine_of(theirs, asking=False))
    assert sorted(to_asker) == sorted(record for _, record in theirs.values())
    assert sorted(to_answerer) == sorted(record for _, record in mine.values())
    assert sum(isinstance(m, Digest) for m in messages) == 2
    assert sum(isinstance(m, Wanted) for m in messages) == 2
    assert sum(isinstance(m, Records) for m in messages) > 6
    assert max(len(SYNC.encode(m)) for m in messages) <= MAX_MESSAGE_BYTES


def test_the_largest_records_fit() -> None:
    mine = {key(n): ((1, 1), bytes(65536)) for n in range(1, 300)}
    _, to_answerer, messages = converse(machine_of(mine, asking=True), machine_of({}, asking=False))
    assert len(to_answerer) == MAX_RECORDS_BYTES // 65536  # the rest comes with the next exchange
    assert max(len(SYNC.encode(m)) for m in messages) <= MAX_MESSAGE_BYTES


def test_what_is_known_but_expired_is_neither_given_nor_wanted() -> None:
    asker = SyncMachine({key(1): (1, 1), key(2): (1, 9)}, {}, asking=True)
    answerer = machine_of({key(1): ((1, 1), b"stale"), key(2): ((1, 1), b"stale")}, asking=False)
    assert converse(asker, answerer)[:2] == ([], [])


def test_ages_travel_with_records() -> None:
    asker = SyncMachine({}, {}, asking=True)
    answerer = machine_of({key(1): ((1, 1), b"a")}, asking=False, age_s=1.25)
    asker.begin()
    effects = answerer.handle(Digest(held=()))
    assert effects[0] == Send(Records(items=(Item(record=b"a", age_ms=1250),)))
    assert asker.handle(effects[0].message) == (Take(b"a", 1.25),)
    assert asker.handle(Wanted(names=())) == (Send(Records(items=())), Finished(0, 1))


EXAMPLES: dict[type[Message], Message] = {
    Digest: Digest(held=()),
    Wanted: Wanted(names=()),
    Records: Records(items=()),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_message_out_of_turn_is_refused(state: State, kind: type[Message]) -> None:
    machine = SyncMachine({}, {}, asking=True)
    machine.state = state
    if (state, kind, False) in TRANSITIONS:
        machine.handle(EXAMPLES[kind])
        assert machine.state is TRANSITIONS[state, kind, False]
    else:
        with pytest.raises(RemoteProtocolError, match="no place in the state"):
            machine.handle(EXAMPLES[kind])
        assert machine.state is State.FAILED


def test_a_side_begins_once_and_only_the_asker() -> None:
    asker = SyncMachine({}, {}, asking=True)
    asker.begin()
    for machine in (asker, SyncMachine({}, {}, asking=False)):
        with pytest.raises(LocalProtocolError, match="can't begin"):
            machine.begin()


def reading() -> SyncMachine:
    return SyncMachine({}, {}, asking=False)


def test_a_digest_must_be_sorted_over_all_its_pages() -> None:
    order = sorted((1, 2, 3), key=lambda n: public_key_of(peer_of(n)))
    held = [Held(name=name(n), incarnation=1, sequence=1) for n in order]
    for pages in ([held[::-1]], [[held[0], held[0]]], [[held[1]], [held[0]]]):
        machine = reading()
        with pytest.raises(RemoteProtocolError, match="not sorted"):
            for page in pages:
                machine.handle(Digest(held=tuple(page), more=page is not pages[-1]))


def test_pages_can_not_go_on_for_ever() -> None:
    names = sorted((name(n) for n in range(1, MAX_PAGE_ENTRIES + 1)), key=lambda n: n.signer)
    machine = reading()
    with pytest.raises(RemoteProtocolError, match=f"more than {MAX_ENTRIES}"):
        for page in range(MAX_ENTRIES // MAX_PAGE_ENTRIES + 1):
            held = tuple(
                Held(name=Name(domain=f"d{page}", signer=n.signer), incarnation=1, sequence=1) for n in names
            )
            machine.handle(Digest(held=held, more=True))
    for empty in (Digest(held=(), more=True), Records(items=(), more=True)):
        machine = reading()
        machine.state = State.READING if isinstance(empty, Digest) else State.TAKING
        with pytest.raises(RemoteProtocolError, match="empty page"):
            machine.handle(empty)


def test_records_can_not_go_on_for_ever() -> None:
    machine = reading()
    machine.handle(Digest(held=()))
    page = Records(items=(Item(record=bytes(60_000)),) * 3, more=True)
    with pytest.raises(RemoteProtocolError, match=f"limits {MAX_ENTRIES} and {MAX_RECORDS_BYTES}"):
        for _ in range(MAX_RECORDS_BYTES // 180_000 + 1):
            machine.handle(page)


def test_only_what_was_offered_can_be_wanted() -> None:
    asker = machine_of({key(1): ((1, 1), b"a")}, asking=True)
    asker.begin()
    asker.handle(Records(items=()))
    with pytest.raises(RemoteProtocolError, match="not in our digest"):
        asker.handle(Wanted(names=(name(2),)))


def test_the_table_of_the_specification_is_that_of_the_machine() -> None:
    text = (PROTOCOLS / "sync" / "SPEC.md").read_text()
    rows = {
        f"| {before.value} | {kind.__name__} | {'yes' if more else 'no'} | {after.value} |"
        for (before, kind, more), after in TRANSITIONS.items()
    }
    assert rows <= set(text.splitlines())
    assert all(state.value in text for state in State)


def test_vectors() -> None:
    digest = Digest(held=(Held(name=name(1), incarnation=1_700_000_000_000, sequence=7),), more=True)
    wanted = Wanted(names=(name(1), name(1, "head")))
    records = Records(items=(Item(record=b"record", age_ms=250), Item(record=b"")))
    good: list[Message] = [Digest(held=()), digest, Wanted(names=()), wanted, Records(items=()), records]
    names = ["an empty digest", "a page of a digest", "nothing wanted", "two wanted", "no records", "two records"]
    long_page = [{1: {1: "a", 2: bytes(32)}, 2: 1, 3: 1}] * (MAX_PAGE_ENTRIES + 1)
    hold(
        "sync",
        [
            *(Case(label, SYNC.encode(message), message) for label, message in zip(names, good, strict=True)),
            Case("an odd unknown key", dumps({0: 1, 1: [], 9: 0}), Digest(held=())),
            Case("an unknown tag", dumps({0: 4, 1: []})),
            Case("no tag", dumps({1: []})),
            Case("a short key", dumps({0: 2, 1: [{1: "advert", 2: bytes(31)}]})),
            Case("a page that is too long", dumps({0: 1, 1: long_page})),
            Case("a record that is too large", dumps({0: 3, 1: [{1: bytes(65537)}]})),
            Case("a negative age", dumps({0: 3, 1: [{1: b"", 2: -1}]})),
            Case("an even unknown key", dumps({0: 1, 1: [], 4: 0})),
            Case("more spelt out as false", dumps({0: 1, 1: [], 2: False})),
        ],
        SYNC.decode,
    )
