"""The question to keep layers, over a stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from meshnode.core.errors import PeerUnreachable
from meshnode.services.holds import HoldAnswers, HoldQuestions
from protocols.errors import RemoteProtocolError
from protocols.frame import pack
from protocols.ids import PeerId
from protocols.intent.messages import HOLDS, PROTOCOL, Answer, Held, Hold, NotHeld

QUESTION = Hold(manifest="m", variant="v", first=0, last=4, epoch=1, hold_ms=1000)


class OneStream:
    """A stream in memory that knows who is at the other end."""

    def __init__(self, inner: Any, peer: str) -> None:
        self._inner = inner
        self.peer = PeerId(peer)

    async def send_all(self, data: bytes | memoryview) -> None:
        await self._inner.send_all(data)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        return bytes(await self._inner.receive_some(max_bytes))

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def reset(self) -> None:
        await self._inner.aclose()


class TwoHosts:
    """The parts of a host that the question needs, for two nodes in one nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.handlers: dict[str, Callable[[Any], Awaitable[None]]] = {}
        self.blame: list[Exception] = []

    def handle(self, protocol: str, handler: Any, *, open_to_strangers: bool = False) -> None:
        assert not open_to_strangers
        self.handlers[protocol] = handler

    async def open_stream(self, peer: PeerId, protocol: str, lane: Any = None) -> OneStream:
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(self._serve, protocol, OneStream(theirs, "asker"))
        return OneStream(ours, peer)

    async def _serve(self, protocol: str, stream: OneStream) -> None:
        try:
            await self.handlers[protocol](stream)
        except (RemoteProtocolError, PeerUnreachable) as error:
            self.blame.append(error)
        finally:
            await stream.aclose()


class Keeper:
    """Answers everybody the same."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[tuple[PeerId, Hold]] = []

    def answer_hold(self, peer: PeerId, hold: Hold) -> Answer:
        self.asked.append((peer, hold))
        return self.answer


@pytest.mark.parametrize("answer", [Held(hold_ms=1000), NotHeld(code="moving", reason="elsewhere")])
async def test_a_question_and_its_answer(answer: Answer) -> None:
    keeper = Keeper(answer)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            hosts: Any = TwoHosts(nursery)
            HoldAnswers(hosts, keeper)
            assert await HoldQuestions(hosts).ask(PeerId("b"), QUESTION) == answer
    assert keeper.asked == [(PeerId("asker"), QUESTION)]


async def test_a_silent_peer_is_given_up(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts: Any = TwoHosts(nursery)

    async def silent(stream: Any) -> None:
        await trio.sleep_forever()

    hosts.handle(PROTOCOL, silent)
    with pytest.raises(PeerUnreachable, match="within 5 s"):
        await HoldQuestions(hosts).ask(PeerId("b"), QUESTION)


@pytest.mark.parametrize("data", [pack(HOLDS.encode(Held(hold_ms=1))), pack(b"\xff"), b"\xff" * 100])
async def test_a_bad_question_is_the_peers_fault(autojump_clock: MockClock, data: bytes) -> None:
    async with trio.open_nursery() as nursery:
        hosts: Any = TwoHosts(nursery)
        HoldAnswers(hosts, Keeper(Held(hold_ms=1)))
        stream = await hosts.open_stream(PeerId("b"), PROTOCOL)
        await stream.send_all(data)
        assert await stream.receive_some() == b""
        assert isinstance(hosts.blame[0], RemoteProtocolError)


@pytest.mark.parametrize("reply", [b"", b"\xff" * 100, pack(HOLDS.encode(QUESTION))])
async def test_a_bad_answer_promises_nothing(autojump_clock: MockClock, reply: bytes) -> None:
    async with trio.open_nursery() as nursery:
        hosts: Any = TwoHosts(nursery)

        async def liar(stream: Any) -> None:
            await stream.send_all(reply)

        hosts.handle(PROTOCOL, liar)
        with pytest.raises((PeerUnreachable, RemoteProtocolError)):
            await HoldQuestions(hosts).ask(PeerId("b"), QUESTION)
