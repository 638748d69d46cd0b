from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.sync.machine import Key, State, Version
from protocols.sync.messages import Digest, Message, Records, Wanted
from tests.adverts import peer_of
from tests.unit.test_sync import converse, machine_of
from tests.wire import messages

keys = st.tuples(st.sampled_from(["advert", "head", "other"]), st.integers(1, 12).map(peer_of))
versions = st.tuples(st.integers(0, 3), st.integers(0, 3))
snapshots = st.dictionaries(keys, versions, max_size=20)


def with_records(held: dict[Key, Version]) -> dict[Key, tuple[Version, bytes]]:
    return {key: (version, repr((key, version)).encode()) for key, version in held.items()}


@settings(max_examples=150)
@given(snapshots, snapshots)
def test_both_end_with_the_newest_of_both(one: dict[Key, Version], other: dict[Key, Version]) -> None:
    mine, theirs = with_records(one), with_records(other)
    to_me, to_them, _ = converse(machine_of(mine, asking=True), machine_of(theirs, asking=False))
    low = (-1, -1)
    assert sorted(to_me) == sorted(r for k, (v, r) in theirs.items() if v > one.get(k, low))
    assert sorted(to_them) == sorted(r for k, (v, r) in mine.items() if v > other.get(k, low))


any_message: st.SearchStrategy[Message] = messages(Digest) | messages(Wanted) | messages(Records)


@settings(max_examples=200)
@given(st.booleans(), snapshots, st.lists(any_message, max_size=8))
def test_no_sequence_of_messages_raises_anything_else(
    asking: bool, held: dict[Key, Version], received: list[Message]
) -> None:
    machine = machine_of(with_records(held), asking=asking)
    if asking:
        machine.begin()
    for message in received:
        was = machine.state
        try:
            machine.handle(message)
        except RemoteProtocolError:
            assert machine.state is State.FAILED
        assert was not in (State.DONE, State.FAILED) or machine.state is State.FAILED
