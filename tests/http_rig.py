"""The HTTP door on a real loopback socket, with a node behind it that says what a test wants."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio

from meshnode.api.asking import Event
from meshnode.api.messages import (
    Answer,
    DutyStatus,
    Embedding,
    Judgement,
    Piece,
    Receipt,
    ServedModel,
    Stage,
    StageTimes,
    Status,
    ToolCall,
)
from meshnode.core.clock import monotonic, wall_ms
from meshnode.core.errors import Declined
from meshnode.http.app import App
from meshnode.http.door import Offered
from meshnode.http.gate import Gate
from meshnode.http.listen import bind
from meshnode.http.page.files import read_page
from meshnode.http.server import HttpService
from meshnode.services.inference.text import Started
from meshnode.state.audit import Audit, NoAudit
from meshnode.state.memory_state import MemoryState
from meshnode.text.question import Question

MODEL = Offered(
    name="small",
    version="v1.0.0-0",
    manifest="bafyreismall",
    variant="int4",
    family="llama",
    context=64,
    hidden=32,
    layers=4,
    size_bytes=1000,
    created_s=1_700_000_000,
)
RECEIPT = Receipt(
    model=ServedModel(name="small", manifest="bafyreismall", variant="int4", layers=4),
    route=(Stage(peer="A", first=0, last=2), Stage(peer="B", first=2, last=4)),
    cached_tokens=2,
    ttft_ms=12.5,
    decode_tok_s=50.0,
    hops=(StageTimes(peer="A", first=0, last=2, network_ms=0.1, queue_ms=0.2, compute_ms=3.0),),
)


class FakeDoor:
    """Implements `Door`: every question is answered with `words`, one token each."""

    def __init__(self, words: Sequence[str] = ("one", " two", " three")) -> None:
        self.words = words
        self.asked: list[Question] = []
        self.judged: list[tuple[Any, Any, Any]] = []
        self.orders: list[tuple[str, Any]] = []
        self.upstream: list[str] = []
        self.begun = trio.Event()  # set when the first question comes
        self.ended = trio.Event()  # set when a question ends before its answer
        self.hold: trio.Event | None = None  # the answer stops after its first word until this is set
        self.before: list[Event] = []
        self.error: Exception | None = None
        self.error_after = 0  # words
        self.reason = "length"
        self.calls: list[ToolCall] = []
        self.offered: Sequence[Offered] = (MODEL,)
        self.news = trio.Event()
        self.audit: Audit = NoAudit()

    def models(self) -> Sequence[Offered]:
        return self.offered

    def why_no_model(self) -> str:
        return "nobody has published a model"

    async def ask(self, question: Question) -> AsyncGenerator[Event, None]:
        self.asked.append(question)
        self.begun.set()
        try:
            for event in self.before:
                yield event
                await trio.lowlevel.checkpoint()
            if self.error is not None and not self.error_after:
                raise self.error
            yield Started(3, 2)
            for call in self.calls:
                yield Piece("", -1, call=call)
            for index, word in enumerate(self.words[: question.max_tokens]):
                if self.error is not None and index == self.error_after:
                    raise self.error
                yield Piece(word, index)
                if self.hold is not None:
                    await self.hold.wait()
        except BaseException:
            self.ended.set()
            raise
        said = self.words[: question.max_tokens]
        yield Answer(
            text="".join(said),
            reason=self.reason,
            stopped_by="END" if self.reason == "stop" else "",
            id="7",
            token_ids=tuple(range(len(said))),
            prompt_token_ids=(1, 2, 3),
            tool_calls=tuple(self.calls),
            receipt=RECEIPT,
        )

    def ask_upstream(self, model: str, question: Question) -> AsyncGenerator[Event, None]:
        self.upstream.append(model)
        return self.ask(question)

    async def embed(self, text: str | Sequence[int], adapter: str | None) -> Embedding:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return Embedding(vector=(0.6, -0.8), prompt_token_ids=(1,) * len(text))

    async def count(self, question: Question) -> int:
        await trio.lowlevel.checkpoint()
        return sum(len(turn["content"].split()) for turn in question.messages or ())

    def judge(self, answer: Any, correct: Any, label: Any) -> Judgement:
        self.judged.append((answer, correct, label))
        return Judgement(answer=answer, correct=correct, label=label)

    def obey(self, order: str, seconds: Any) -> DutyStatus:
        self.orders.append((order, seconds))
        return DutyStatus(duty="paused", ordered="paused", why="somebody asked for it")

    def name_peers(self, sentence: str) -> str:
        return sentence.replace("PEER", "laptop (PEER)")

    def status(self) -> Status:
        return Status(peer="A", ready=True, sessions=len(self.asked))

    async def changed(self) -> None:
        await self.news.wait()

    @property
    def ready(self) -> tuple[bool, str]:
        return bool(self.offered), "a probe token passed through the chain in 5 ms"


class Served:
    """The door, and where it answers."""

    def __init__(self, door: FakeDoor, url: str, port: int, app: App, state: MemoryState) -> None:
        self.door = door
        self.url = url
        self.port = port
        self.app = app
        self.state = state

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(timeout=30) as client:
            return await client.post(self.url + path, json=body, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(timeout=30) as client:
            return await client.get(self.url + path, **options)

    async def raw(self, data: bytes) -> trio.SocketStream:
        """A connection of our own on which these bytes were sent."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        await stream.send_all(data)
        return stream


@asynccontextmanager
async def serving(
    door: FakeDoor | None = None, *, keyed: bool = False, origins: Sequence[str] = ()
) -> AsyncIterator[Served]:
    """The door, served while the block runs."""
    door = door or FakeDoor()
    binding = bind("127.0.0.1:0")
    state = MemoryState()
    app = App(door, wall_ms, Gate(state, wall_ms, monotonic, keyed=keyed, origins=origins), read_page())
    service = HttpService(binding, app.build())
    port = binding.socket.getsockname()[1]
    assert binding.socket.family == socket.AF_INET
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        yield Served(door, binding.url, port, app, state)
        nursery.cancel_scope.cancel()


def declined(code: str, text: str = "no") -> Declined:
    return Declined(code, text)
