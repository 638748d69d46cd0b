"""Brings answers to a client: whole, or in pieces with signs of life; a client that leaves ends its questions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Final

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshnode.api.asking import Event
from meshnode.api.messages import Answer
from meshnode.core.log import get_logger
from meshnode.http.json_text import JsonResponse
from meshnode.http.problems import Problem, internal
from meshnode.http.task import Task
from meshnode.text.question import Question

HOLD_S: Final = 3.0  # so long an answer in pieces waits for its first one, for a status code can't be taken back
WAITING: Final = 64  # events that wait to be sent
PING_S: Final = 10.0  # between signs of life: proxies and clients give up at 30 or 60 s of silence

Ask = Callable[[Question], AsyncGenerator[Event, None]]
Refuse = Callable[[Problem], Response]
Happened = tuple[int, Event] | Problem
Finished = Callable[[Sequence[Answer]], None]

_log = get_logger("http")


class Delivery(Response):
    """An ASGI response that asks while it is sent."""

    def __init__(self, ask: Ask, task: Task, refuse: Refuse, finished: Finished) -> None:
        """
        Args:
          ask: the events of one question; raises Problem.
          refuse: makes the response to a problem that comes before the answer.
          finished: told when every question is answered.
        """
        super().__init__()
        self._ask_one = ask
        self._task = task
        self._refuse = refuse
        self._finished = finished
        self._answers: list[Answer | None] = [None] * len(task.questions)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, receive, nursery.cancel_scope)
            give, take = trio.open_memory_channel[Happened](WAITING)
            nursery.start_soon(self._ask_all, give)
            if self._task.stream:
                await self._stream(take, scope, receive, send)
            else:
                await self._whole(take, scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _watch(self, receive: Receive, scope: trio.CancelScope) -> None:
        """A client that goes away cancels what it asked for."""
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _ask_all(self, give: trio.MemorySendChannel[Happened]) -> None:
        async with give:
            try:
                async with trio.open_nursery() as nursery:
                    for index in range(len(self._task.questions)):
                        nursery.start_soon(self._ask, index, give.clone())
            except* Problem as group:
                await _last(give, _first(group))
            except* trio.BrokenResourceError:
                pass  # the reader has left
            except* Exception:  # noqa: BLE001 - the border: a bug costs its answer alone
                _log.exception("answer.failed")
                await _last(give, internal())

    async def _ask(self, index: int, give: trio.MemorySendChannel[Happened]) -> None:
        async with give, aclosing(self._ask_one(self._task.questions[index])) as events:
            async for event in events:
                if isinstance(event, Answer):
                    self._answers[index] = event
                await give.send((index, event))

    async def _whole(
        self,
        take: trio.MemoryReceiveChannel[Happened],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        async for event in take:
            if isinstance(event, Problem):
                await self._refuse(event)(scope, receive, send)
                return
        answers = self._done()
        await JsonResponse(self._task.document(answers), headers=self._receipt_headers(answers))(scope, receive, send)

    async def _stream(
        self,
        take: trio.MemoryReceiveChannel[Happened],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        task, began = self._task, False
        deadline = trio.current_time() + HOLD_S
        while True:
            happened = await _next(take, deadline)
            data, last = task.ping if not happened else b"", False
            for event in happened:
                match event:
                    case None:
                        data, last = data + task.end(self._done()), True
                    case Problem() if not began and not data:
                        await self._refuse(event)(scope, receive, send)
                        return
                    case Problem():
                        data, last = data + task.fail(event), True
                        break
                    case (index, told):
                        data += task.feed(index, told)
            if data or not happened:
                deadline = trio.current_time() + PING_S
                if not began:
                    began = True
                    await send({"type": "http.response.start", "status": 200, "headers": self._stream_headers()})
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": not last})
            if last:
                return

    def _done(self) -> list[Answer]:
        answers = [answer for answer in self._answers if answer is not None]
        self._finished(answers)
        return answers

    def _stream_headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", self._task.media_type.encode()),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
            (b"x-meshnode-receipt", self._task.id.encode()),
        ]

    def _receipt_headers(self, answers: Sequence[Answer]) -> dict[str, str]:
        receipt = answers[0].receipt
        route = ", ".join(f"{stage.peer}:{stage.first}-{stage.last}" for stage in receipt.route)
        return {
            "x-meshnode-receipt": self._task.id,
            "x-meshnode-model": receipt.model.manifest or receipt.model.name,
            "x-meshnode-route": route,
        }


async def _next(take: trio.MemoryReceiveChannel[Happened], deadline: float) -> list[Happened | None]:
    """What has happened since the last time, in one go; None is the end. Empty: nothing until the deadline."""
    found: list[Happened | None] = []
    with trio.move_on_at(deadline):
        try:
            found.append(await take.receive())
            while len(found) < WAITING:
                found.append(take.receive_nowait())
        except trio.WouldBlock:
            pass
        except trio.EndOfChannel:
            found.append(None)
    return found


def _first(group: BaseExceptionGroup[Problem]) -> Problem:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Problem)
    return error


async def _last(give: trio.MemorySendChannel[Happened], problem: Problem) -> None:
    with suppress(trio.BrokenResourceError):
        await give.send(problem)
