"""The question to keep layers, over a stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from meshnode.core.errors import PeerUnreachable
from meshnode.net.port import Stream
from meshnode.services.holds import HoldAnswers, HoldQuestions
from meshnode.sim.network import MemoryHost, MemoryNetwork
from protocols.errors import RemoteProtocolError
from protocols.frame import pack
from protocols.ids import PeerId
from protocols.intent.messages import HOLDS, PROTOCOL, Answer, Held, Hold, NotHeld
from tests.adverts import peer_of
from tests.everything import EVERYTHING

QUESTION = Hold(manifest="m", variant="v", first=0, last=4, epoch=1, hold_ms=1000)


class Keeper:
    """Answers everybody the same."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[tuple[PeerId, Hold]] = []

    def answer_hold(self, peer: PeerId, hold: Hold) -> Answer:
        self.asked.append((peer, hold))
        return self.answer


@pytest.fixture
async def hosts(nursery: trio.Nursery) -> tuple[MemoryHost, MemoryHost]:
    """Who asks, and who is asked; they admit each other."""
    network = MemoryNetwork()
    one, other = (network.host(peer_of(number)) for number in (1, 2))
    for host, peer in ((one, other), (other, one)):
        await nursery.start(host.run)
        host.admit(peer.peer_id, True)
    await one.connect(other.peer_id, other.addresses)
    return one, other


@pytest.mark.parametrize("answer", [Held(hold_ms=1000), NotHeld(code="moving", reason="elsewhere")])
async def test_a_question_and_its_answer(
    hosts: tuple[MemoryHost, MemoryHost], autojump_clock: MockClock, answer: Answer
) -> None:
    one, other = hosts
    keeper = Keeper(answer)
    HoldAnswers(other, keeper, EVERYTHING)
    assert await HoldQuestions(one).ask(other.peer_id, QUESTION) == answer
    assert keeper.asked == [(one.peer_id, QUESTION)]


async def test_a_silent_peer_is_given_up(hosts: tuple[MemoryHost, MemoryHost], autojump_clock: MockClock) -> None:
    one, other = hosts
    other.handle(PROTOCOL, says(None))
    with pytest.raises(PeerUnreachable, match="within 5 s"):
        await HoldQuestions(one).ask(other.peer_id, QUESTION)


@pytest.mark.parametrize("data", [pack(HOLDS.encode(Held(hold_ms=1))), pack(b"\xff"), b"\xff" * 100])
async def test_a_bad_question_is_the_peers_fault(
    hosts: tuple[MemoryHost, MemoryHost], autojump_clock: MockClock, data: bytes
) -> None:
    one, other = hosts
    keeper = Keeper(Held(hold_ms=1))
    HoldAnswers(other, keeper, EVERYTHING)
    stream = await one.open_stream(other.peer_id, PROTOCOL)
    with structlog.testing.capture_logs() as said:
        await stream.send_all(data)
        with pytest.raises(PeerUnreachable):
            await stream.receive_some()
    assert keeper.asked == []
    assert [entry["event"] for entry in said] == ["stream.ended"]


@pytest.mark.parametrize("reply", [b"", b"\xff" * 100, pack(HOLDS.encode(QUESTION))])
async def test_a_bad_answer_promises_nothing(
    hosts: tuple[MemoryHost, MemoryHost], autojump_clock: MockClock, reply: bytes
) -> None:
    one, other = hosts
    other.handle(PROTOCOL, says(reply))
    with pytest.raises((PeerUnreachable, RemoteProtocolError)):
        await HoldQuestions(one).ask(other.peer_id, QUESTION)


def says(reply: bytes | None) -> Callable[[Stream], Awaitable[None]]:
    """Whoever answers every question with this, or never."""

    async def handle(stream: Stream) -> None:
        if reply is None:
            await trio.sleep_forever()
        else:
            await stream.send_all(reply)

    return handle
