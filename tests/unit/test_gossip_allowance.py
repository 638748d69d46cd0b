"""What neighbours gossip, as our side reads it: a stream in memory, in virtual time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_uvarint
from trio.testing import MockClock

from meshnode.net.libp2p.gossip import CONTROL_BYTES, COPY, MESSAGE_BURST, MESSAGES_PER_S, GuardedPubsub
from meshnode.net.libp2p.replacements import ConnectionWatcher, Libp2pStack
from protocols.ids import PeerId
from tests.adverts import peer_of

TOPIC = "/test/topic"
ONE, OTHER = ID.from_string(peer_of(1)), ID.from_string(peer_of(2))


class Taker:
    """Remembers what it was asked about, and finds nothing good."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def __call__(self, giver: PeerId, data: bytes) -> bool:
        self.asked.append(data)
        if data == b"bug":
            raise ValueError("a bug in a taker")
        return False


class Stream:
    """Frames of one neighbour; then its end."""

    def __init__(self, peer_id: Any, frames: list[Any]) -> None:
        self.muxed_conn = SimpleNamespace(peer_id=peer_id)
        frames = [frame if isinstance(frame, bytes) else frame.SerializeToString() for frame in frames]
        self._data = b"".join(encode_uvarint(len(frame)) + frame for frame in frames)
        self.was_reset = False

    async def read(self, n: int) -> bytes:
        if not self._data:
            raise StreamEOF("the stream has ended")
        data, self._data = self._data[:n], self._data[n:]
        return data

    async def reset(self) -> None:
        self.was_reset = True


@pytest.fixture
def taker() -> Taker:
    return Taker()


@pytest.fixture
def slowed() -> list[PeerId]:
    return []


@pytest.fixture
def pubsub(taker: Taker, slowed: list[PeerId]) -> GuardedPubsub:
    async def nobody(peer: PeerId, protocols: tuple[str, ...]) -> Any:
        raise AssertionError("no stream is opened here")

    stack = Libp2pStack(bytes(32), ConnectionWatcher(), tuple, nobody, lambda peer: (), lambda peer: True, b"")
    stack.pubsub.takers[TOPIC] = taker
    stack.pubsub.subscribed_topics_receive[TOPIC] = None
    stack.pubsub._manager = SimpleNamespace(is_running=True)
    stack.pubsub.flooded = slowed.append
    return stack.pubsub


def message(number: int, data: bytes = b"", topic: str = TOPIC) -> Any:
    """With no signature: whoever checks it, refuses it."""
    return rpc_pb2.Message(
        from_id=ONE.to_bytes(), seqno=number.to_bytes(8, "big"), data=data or b"%d" % number, topicIDs=[topic]
    )


def frames(*messages: Any, each: int = 1) -> list[Any]:
    return [rpc_pb2.RPC(publish=messages[at : at + each]) for at in range(0, len(messages), each)]


async def took(pubsub: GuardedPubsub, peer_id: Any, sent: list[Any]) -> float:
    """How long reading all of it takes."""
    began = trio.current_time()
    await pubsub.continuously_read_stream(Stream(peer_id, sent))
    return trio.current_time() - began


@pytest.mark.parametrize("each", [1, 50])
async def test_a_burst_costs_no_time_and_a_flood_is_read_at_the_rate(
    pubsub: GuardedPubsub, taker: Taker, slowed: list[PeerId], autojump_clock: MockClock, each: int
) -> None:
    burst, more = int(MESSAGE_BURST / (1 + COPY)), 200
    assert await took(pubsub, ONE, frames(*map(message, range(burst)), each=each)) < 0.1
    assert not slowed
    flood = map(message, range(burst, burst + more))
    assert await took(pubsub, ONE, frames(*flood, each=each)) > 0.7 * more / MESSAGES_PER_S
    assert set(slowed) == {peer_of(1)}
    assert taker.asked == [b"%d" % number for number in range(burst + more)], "late, but nothing is lost"
    slowed.clear()
    assert await took(pubsub, OTHER, frames(message(1 << 30))) < 0.1, "another neighbour does not wait for it"
    await trio.sleep(10)
    assert await took(pubsub, ONE, frames(*map(message, range(1000, 1100)))) < 0.1, "and it is over with the flood"
    assert not slowed


async def test_copies_and_orders_are_not_free(
    pubsub: GuardedPubsub, taker: Taker, slowed: list[PeerId], autojump_clock: MockClock
) -> None:
    pubsub.seen_messages.add(pubsub._msg_id_constructor(message(1)))
    count = round(2 * MESSAGE_BURST / (2 * COPY))
    assert await took(pubsub, ONE, frames(*[message(1)] * count)) > 0.9 * MESSAGE_BURST / MESSAGES_PER_S
    assert not taker.asked
    assert slowed


async def test_orders_to_the_router_cost_by_their_size(
    pubsub: GuardedPubsub, slowed: list[PeerId], autojump_clock: MockClock
) -> None:
    wishes = rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=[bytes(40)] * 400)])
    size = wishes.ByteSize() / CONTROL_BYTES
    count = round(2 * MESSAGE_BURST / size)
    sent = [rpc_pb2.RPC(control=wishes) for _ in range(count)]
    assert await took(pubsub, ONE, sent) > 0.8 * MESSAGE_BURST / MESSAGES_PER_S
    assert slowed


async def test_its_taker_is_asked_before_a_signature_is_checked(
    pubsub: GuardedPubsub, taker: Taker, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []

    def refuse(msg: Any) -> bool:
        checked.append(msg)
        return False

    monkeypatch.setattr("libp2p.pubsub.pubsub.signature_validator", refuse)
    await took(pubsub, ONE, frames(message(1), message(2, b"bug"), message(3)))
    assert taker.asked == [b"1", b"bug", b"3"]
    assert not checked
    pubsub.takers[TOPIC] = lambda giver, data: True
    await took(pubsub, ONE, frames(message(4)))
    assert [msg.data for msg in checked] == [b"4"]
    assert not pubsub.seen_messages.has(pubsub._msg_id_constructor(message(4))), "a forgery hides no message"


async def test_what_is_no_message_is_dropped(pubsub: GuardedPubsub, taker: Taker, autojump_clock: MockClock) -> None:
    two = message(1)
    two.topicIDs.append("/test/other")
    await took(pubsub, ONE, frames(two, message(2, topic="/test/other"), message(3, bytes(1 << 17)), message(4)))
    assert taker.asked == [b"4"]


async def test_the_own_messages_of_a_node_ask_nobody(
    pubsub: GuardedPubsub, taker: Taker, autojump_clock: MockClock
) -> None:
    await pubsub.publish(TOPIC, b"ours")
    assert not taker.asked
