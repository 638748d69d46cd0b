"""The control socket with a real unix socket: whatever comes in, it answers one line and goes on."""

from __future__ import annotations

import json
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.api.control import MAX_CLIENTS, MAX_REQUEST_BYTES, REQUEST_S, ControlService
from meshnode.api.messages import Json
from meshnode.core.errors import ConfigError, Declined, ModelError, PeerUnreachable
from protocols.errors import RemoteProtocolError


@dataclass
class Desk:
    """A control service and what its commands went through."""

    path: Path
    begun: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    error: Exception = field(default_factory=lambda: Declined("busy", "come again"))

    async def count(self, request: Json) -> AsyncGenerator[Json, None]:
        for number in range(int(request.get("to", 3))):
            await trio.lowlevel.checkpoint()
            yield {"number": number}
        yield {"done": True}

    async def wait(self, _request: Json) -> AsyncGenerator[Json, None]:
        self.begun.set()
        try:
            await trio.sleep_forever()
            yield {"done": True}
        finally:
            self.ended.set()

    async def fail(self, _request: Json) -> AsyncGenerator[Json, None]:
        yield {"number": 0}
        raise self.error

    async def ask(self, line: bytes) -> list[Any]:
        """Send raw bytes; every answer until the service hangs up."""
        stream = await trio.open_unix_socket(str(self.path))
        async with stream:
            await stream.send_all(line)
            return await answers(stream)

    async def works(self) -> None:
        """It still serves."""
        assert (await self.ask(b'{"do":"count","to":1}\n'))[-1] == {"done": True}


async def answers(stream: trio.abc.ReceiveStream) -> list[Any]:
    data = bytearray()
    with trio.fail_after(20):
        while piece := await stream.receive_some(65536):
            data += piece
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path / "control.sock")
    service = ControlService(desk.path, {"count": desk.count, "wait": desk.wait, "fail": desk.fail})
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        yield desk
        nursery.cancel_scope.cancel()
    assert not desk.path.exists(), "the socket goes with the service"


async def test_a_command_answers_line_by_line(desk: Desk) -> None:
    assert await desk.ask(b'{"do":"count","to":2}\n') == [{"number": 0}, {"number": 1}, {"done": True}]


async def test_the_socket_is_for_its_owner(desk: Desk) -> None:
    assert stat.S_IMODE(desk.path.stat().st_mode) == 0o600


async def test_a_request_may_come_in_pieces(desk: Desk) -> None:
    async with await trio.open_unix_socket(str(desk.path)) as stream:
        for piece in (b'{"do":', b'"count",', b'"to":1}', b"\n"):
            await stream.send_all(piece)
            await wait_all_tasks_blocked()
        assert (await answers(stream))[-1] == {"done": True}


@pytest.mark.parametrize("rest", [b"rest", b'{"do":"dance"}\n', b"\n\n"])
async def test_what_follows_the_first_line_is_ignored(desk: Desk, rest: bytes) -> None:
    assert await desk.ask(b'{"do":"count","to":0}\n' + rest) == [{"done": True}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"hello\n", "one line of JSON"),
        (b"\n", "one line of JSON"),
        (b"\xff\xfe\x00\n", "one line of JSON"),
        (b'{"do":"count"\n', "one line of JSON"),
        (b'{"do":"count"} {"do":"count"}\n', "one line of JSON"),
        (b"[" * 100_000 + b"\n", "one line of JSON"),
        (b'{"a":' * 100_000 + b"\n", "one line of JSON"),
        (b"1" * 10_000 + b"\n", "one line of JSON"),
        (b"[]\n", "names are count, fail, wait"),
        (b"null\n", "names are count, fail, wait"),
        (b"{}\n", "names are count, fail, wait"),
        (b'{"do":"dance"}\n', "names are count, fail, wait"),
        (b'{"do":null}\n', "names are count, fail, wait"),
        (b'{"do":["count"]}\n', "names are count, fail, wait"),
        (b'{"do":{"count":1}}\n', "names are count, fail, wait"),
    ],
)
async def test_nonsense_gets_one_line(desk: Desk, line: bytes, words: str) -> None:
    (answer,) = await desk.ask(line)
    assert answer["error"]["code"] == "bad-request"
    assert words in answer["error"]["text"]
    assert len(answer["error"]["text"]) < 300
    await desk.works()


@pytest.mark.parametrize("size", [MAX_REQUEST_BYTES + 1, 3 * MAX_REQUEST_BYTES])
async def test_a_line_that_is_too_long_is_refused_and_the_answer_arrives(desk: Desk, size: int) -> None:
    (answer,) = await desk.ask(b"x" * size + b"\n")
    assert answer["error"]["code"] == "bad-request"
    assert f"more than {MAX_REQUEST_BYTES} bytes" in answer["error"]["text"]
    await desk.works()


@pytest.mark.parametrize("sent", [b"", b'{"do":', b'{"do":"count"}'])
async def test_a_client_that_goes_away_before_it_has_asked(desk: Desk, sent: bytes) -> None:
    async with await trio.open_unix_socket(str(desk.path)) as stream:
        if sent:
            await stream.send_all(sent)
    await desk.works()


async def test_a_client_that_goes_away_in_the_middle_cancels_its_command(desk: Desk) -> None:
    with trio.fail_after(20):
        async with await trio.open_unix_socket(str(desk.path)) as stream:
            await stream.send_all(b'{"do":"wait"}\n')
            await desk.begun.wait()
        await desk.ended.wait()
    await desk.works()


async def test_a_client_that_does_not_read_its_answers_goes_away(desk: Desk) -> None:
    async with await trio.open_unix_socket(str(desk.path)) as stream:
        await stream.send_all(b'{"do":"count","to":1000000}\n')
        await stream.receive_some(1)
    await desk.works()


async def test_a_client_that_says_nothing_is_sent_away(desk: Desk, autojump_clock: MockClock) -> None:
    for sent in (b"", b'{"do":"count"'):
        async with await trio.open_unix_socket(str(desk.path)) as stream:
            if sent:
                await stream.send_all(sent)
            with trio.move_on_after(2 * REQUEST_S):
                (answer,) = [json.loads(line) for line in (await stream.receive_some(65536)).splitlines()]
                assert answer["error"]["code"] == "bad-request"
                assert f"within {REQUEST_S:.0f} s" in answer["error"]["text"]
                continue
            raise AssertionError("nothing was answered")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Declined("busy", "come again"), "busy", "come again"),
        (PeerUnreachable("the node bob went away"), "PeerUnreachable", "bob"),
        (ModelError("no chat template"), "ModelError", "chat template"),
        (RemoteProtocolError("bob sent nonsense"), "internal", "nonsense"),
        (KeyError("key"), "internal", "the log of the node"),
        (ExceptionGroup("two", [Declined("busy", "come again"), ValueError("x")]), "internal", "the log of the node"),
    ],
)
async def test_whatever_a_command_raises_costs_its_client_only(
    desk: Desk, error: Exception, code: str, words: str
) -> None:
    desk.error = error
    first, last = await desk.ask(b'{"do":"fail"}\n')
    assert first == {"number": 0}
    assert (last["error"]["code"], words in last["error"]["text"]) == (code, True), last
    await desk.works()


async def test_what_a_client_still_sends_does_not_break_its_answer(desk: Desk) -> None:
    """It is read until the client hangs up: closing on unread bytes would reset the connection."""
    async with await trio.open_unix_socket(str(desk.path)) as stream:
        await stream.send_all(b'{"do":"count","to":1}\n')
        data = await stream.receive_some(65536)
        while b"done" not in data:
            data += await stream.receive_some(65536)
        await stream.send_all(b"more\n" * 1000)
        assert await stream.receive_some(65536) == b""
        await stream.send_all(b"and more\n")
        await wait_all_tasks_blocked()


async def test_many_clients_at_once(desk: Desk) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(2 * MAX_CLIENTS):
            nursery.start_soon(desk.works)


async def test_what_a_killed_node_left_behind_is_replaced(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "control.sock").touch()
    await desk.works()


async def test_a_folder_that_can_not_hold_a_socket_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120) / "control.sock"
    with pytest.raises(ConfigError, match=r"the control socket .* can't be made"):
        await ControlService(path, {}).run()
