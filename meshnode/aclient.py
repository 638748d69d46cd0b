"""Talk to the node that runs on this device, under trio or asyncio.

async with meshnode.aconnect() as node:
    async for piece in node.stream("Once upon a time"):
        print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol, Self, Unpack

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from meshnode.api.messages import (
    Answer,
    DutyStatus,
    Embedding,
    Json,
    Judgement,
    Piece,
    ReleaseStatus,
    RolledBack,
    Status,
    read,
)
from meshnode.client import absolute, gone, judgement, not_running, read_line, request_line
from meshnode.core.errors import Declined, NodeError
from meshnode.core.listener_owner import check_listener
from meshnode.core.paths import Paths, data_folder
from meshnode.text.question import Options, Prompt, Question, question

MAX_ANSWER_BYTES: Final = 1 << 26  # one line; a whole answer in tokens and text is far smaller


@asynccontextmanager
async def aconnect(data: str | os.PathLike[str] | None = None) -> AsyncIterator[AsyncClient]:
    """The node that runs on this device; see `meshnode.connect`. What still streams when the block ends is cancelled.

    Nothing here has a limit in time: put it into `anyio.fail_after`, `trio.fail_after` or `asyncio.timeout`.

    Raises NotRunning, with what to do.
    """
    folder = data_folder(None if data is None else Path(data), os.environ)
    await (await _connect(folder)).aclose()
    async with AsyncClient(_Socket(folder)) as client:
        yield client


class Transport(Protocol):
    """Takes commands to a node."""

    def request(self, name: str, fields: Json) -> AsyncGenerator[Json, None]:
        """The answers to a command one by one. Closing it cancels the command."""


class AsyncStream(AsyncIterator[Piece]):
    """An answer as it comes. Closing it (or leaving its `async with`) cancels the generation on every stage.

    `answer`: the whole answer with its receipt, once the last piece has come; None before.
    """

    def __init__(self, answers: AsyncGenerator[Json, None], waiting: Callable[[str], None]) -> None:
        self.answer: Answer | None = None
        self._answers = answers
        self._waiting = waiting

    async def __anext__(self) -> Piece:
        async for answer in self._answers:
            if "waiting" in answer:
                self._waiting(answer["waiting"])
            elif "done" in answer:
                self.answer = Answer.read(answer["done"])
            else:
                return Piece.read(answer)
        raise StopAsyncIteration

    async def whole(self) -> Answer:
        """The rest of it. Raises what iterating raises."""
        async for _ in self:
            pass
        if self.answer is None:
            raise NodeError("gone", "the stream was closed before its answer was complete")
        return self.answer

    async def aclose(self) -> None:
        """Stop the generation, unless it is over."""
        await self._answers.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient:
    """One node. Calls may overlap: each has a connection of its own."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._streams: list[AsyncStream] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            await stream.aclose()

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer; see `Client.generate`. If cancelled: the generation is stopped on every stage."""
        async with self.ask(question(prompt, options)) as stream:
            return await stream.whole()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """The answer piece by piece; see `Client.stream`."""
        return self.ask(question(prompt, options))

    def ask(self, question: Question, *, waiting: Callable[[str], None] = lambda why: None) -> AsyncStream:
        """The answer to a question that was read already; see `Client.ask`."""
        stream = AsyncStream(self._transport.request("generate", question.as_json()), waiting)
        self._streams = [other for other in self._streams if other.answer is None] + [stream]
        return stream

    async def embed(self, text: str | Sequence[int], *, adapter: str | None = None) -> Embedding:
        """A text, or token ids, as one vector; see `Client.embed`. If cancelled: the work ends on every stage."""
        asked = text if isinstance(text, str) else list(text)
        return Embedding.read(await self._done("embed", input=asked, adapter=adapter))

    async def feedback(self, answer: Answer | str, correct: bool, *, label: str = "") -> Judgement:
        """Say whether an answer of this node was right; see `Client.feedback`."""
        return Judgement.read(await self._done("feedback", **judgement(answer, correct, label)))

    async def status(self) -> Status:
        """Everything that `meshnode status` shows."""
        return Status.read(await self._done("status"))

    async def wait_ready(self, seconds: float = 60.0) -> None:
        """Until a token has passed through the whole chain of layers. Raises Declined `not-ready` with the reason."""
        answer = await self._done("ready", seconds=seconds)
        if not answer["ready"]:
            raise Declined("not-ready", f"the mesh is not ready after {seconds:g} s: {answer['readiness']}")

    async def serve(self, model: str, *, variant: str | None = None) -> None:
        """Have the network serve a model that this node knows; see `Client.serve`."""
        await self._done("serve", model=model, variant=variant)

    async def retract(self) -> None:
        """Take back this node's word about which model the network serves; see `Client.retract`."""
        await self._done("retract")

    async def releases(self) -> tuple[ReleaseStatus, ...]:
        """Adapters that are proposed, rolled out, released or revoked, the newest first."""
        return tuple(ReleaseStatus.read(one) for one in await self._done("releases"))

    async def propose(self, adapter: str) -> ReleaseStatus:
        """Propose an adapter in place of what is released; see `Client.propose`."""
        return ReleaseStatus.read(await self._done("propose", adapter=adapter))

    async def roll_back(self, release: str = "", *, why: str = "") -> RolledBack:
        """Go back from an adapter; see `Client.roll_back`."""
        return RolledBack.read(await self._done("roll-back", release=release, why=why))

    async def learn_start(self, suite: str | os.PathLike[str], **options: object) -> Json:
        """Have the network learn; see `Client.learn_start`."""
        answer: Json = await self._done("learn-start", suite=absolute(suite), **options)
        return answer

    async def learn_stop(self) -> None:
        """Take back the lesson that this node has given; see `Client.learn_stop`."""
        await self._done("learn-stop")

    async def pause(self, seconds: float = 0.0) -> DutyStatus:
        """Have the node do nothing in the background; see `Client.pause`."""
        return read(DutyStatus, await self._done("pause", seconds=seconds))

    async def drain(self, seconds: float = 0.0) -> DutyStatus:
        """The same, and give its layers away; see `Client.drain`."""
        return read(DutyStatus, await self._done("drain", seconds=seconds))

    async def resume(self) -> DutyStatus:
        """Undo `pause` and `drain`; see `Client.resume`."""
        return read(DutyStatus, await self._done("resume"))

    async def stop(self) -> None:
        """Have the node hand over its layers and stop. Returns as soon as it has begun to."""
        await self._done("stop")

    async def _done(self, name: str, **fields: Any) -> Any:
        async with aclosing(self._transport.request(name, fields)) as answers:
            async for answer in answers:
                if "done" in answer:
                    return answer["done"]
        raise NodeError("gone", "the node gave no answer")


class _Socket:
    """The control socket of a data folder's node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def request(self, name: str, fields: Json) -> AsyncGenerator[Json, None]:
        async with await _connect(self._folder) as connection:
            with suppress(anyio.BrokenResourceError):  # it refused and hung up: its answer says why
                await connection.send(request_line(name, fields))
            lines = BufferedByteReceiveStream(connection)
            while True:
                try:
                    line = await lines.receive_until(b"\n", MAX_ANSWER_BYTES)
                except (anyio.IncompleteRead, anyio.BrokenResourceError):
                    raise gone(self._folder) from None
                answer = read_line(line)
                yield answer
                if "done" in answer:
                    return


async def _connect(folder: Path) -> anyio.abc.ByteStream:
    """Raises NotRunning; DiskError when it is somebody else who listens."""
    paths = Paths(folder)
    paths.check_socket_folder()
    try:
        stream = await anyio.connect_unix(paths.control_socket)
    except OSError:
        raise not_running(folder) from None
    try:
        check_listener(stream.extra(anyio.abc.SocketAttribute.raw_socket), paths)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise
    return stream
