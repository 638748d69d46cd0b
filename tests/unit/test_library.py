"""meshnode as a library: its public names, how fast it is there, and its client against a node of a few lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio

import meshnode
from meshnode import client, errors
from meshnode.api.control import ControlService
from meshnode.api.messages import (
    Answer,
    Embedding,
    Json,
    Judgement,
    Receipt,
    Stage,
    StageTimes,
    Status,
    error_json,
    read_error,
)
from meshnode.client import Client
from meshnode.core.errors import EXIT_CODES
from meshnode.core.paths import Paths
from protocols.errors import MeshError

ROOT = Path(__file__).resolve().parents[2]

PUBLIC = (
    "Answer AsyncClient AsyncStream Client LocalNode Piece Question Receipt Status Stream __version__ aconnect "
    "connect errors open_node"
)
ERRORS = (
    "BadRequest ConfigError ContentUnavailable Declined DiskError EngineLost FatalError IdentityError MeshError "
    "ModelError NodeError NotRunning PeerUnreachable TransientError"
)


def test_these_names_are_public_and_no_others() -> None:
    assert sorted(meshnode.__all__) == PUBLIC.split()
    assert sorted(errors.__all__) == ERRORS.split()
    for name in PUBLIC.split():
        assert getattr(meshnode, name) is not None
        assert name in dir(meshnode)
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = meshnode.conect


def test_the_blocking_client_needs_the_standard_library_alone() -> None:
    program = (
        "import sys, meshnode\nmeshnode.connect\n"
        "ours = ('meshnode', 'protocols')\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} - set(sys.stdlib_module_names) - set(ours)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert [name for name in eval(done.stdout) if not name.startswith("_")] == []


# ---------------------------------------------------------------- errors and their exit codes


def kinds(kind: type[MeshError] = MeshError) -> set[type[MeshError]]:
    return {kind}.union(*(kinds(below) for below in kind.__subclasses__()))


def test_every_error_has_an_exit_code_that_is_explained() -> None:
    codes = {getattr(kind, "exit_code", 1) for kind in kinds() if kind.__module__.startswith("meshnode")}
    assert codes <= EXIT_CODES.keys()
    text = (ROOT / "README.md").read_text()
    table = {int(code): meaning for code, meaning in re.findall(r"(?m)^\| (\d+) \| (.+) \|$", text)}
    assert table == EXIT_CODES


@pytest.mark.parametrize(
    "error",
    [
        errors.BadRequest("no"),
        errors.Declined("busy", "no"),
        errors.PeerUnreachable("no"),
        errors.ContentUnavailable("no"),
        errors.ModelError("no"),
        errors.DiskError("no"),
        errors.NodeError("internal", "no"),
    ],
)
def test_an_error_of_the_node_is_the_same_error_here(error: MeshError) -> None:
    again = read_error(error_json(error, str(error))["error"])
    assert (type(again), str(again), getattr(again, "code", "")) == (type(error), "no", getattr(error, "code", ""))


# ---------------------------------------------------------------- the client

ANSWER = Answer(
    text="blue",
    reason="eos",
    id="17",
    token_ids=(1, 2),
    prompt_token_ids=(5,),
    receipt=Receipt(
        route=(Stage(peer="p", first=0, last=3),),
        ttft_ms=1.5,
        decode_tok_s=20.0,
        hops=(StageTimes(peer="p", first=0, last=3, network_ms=0.1, queue_ms=0.2, compute_ms=0.3),),
        return_ms=0.4,
    ),
)


class FakeNode:
    """What is asked of it, and when a question was given up."""

    def __init__(self) -> None:
        self.asked: list[Json] = []
        self.given_up = trio.Event()

    async def status(self, request: Json) -> AsyncGenerator[Json, None]:
        yield {"done": {**Status(network="home", ready=True).as_json(), "a field of a later version": 1}}

    async def ready(self, request: Json) -> AsyncGenerator[Json, None]:
        yield {"done": {"ready": request["seconds"] > 1, "readiness": "nobody serves layer 3"}}

    async def feedback(self, request: Json) -> AsyncGenerator[Json, None]:
        self.asked.append(request)
        yield {"done": {"answer": request["answer"], "correct": request["correct"], "label": request["label"]}}

    async def embed(self, request: Json) -> AsyncGenerator[Json, None]:
        ids = tuple(request["input"]) if isinstance(request["input"], list) else (3,)
        yield {"done": Embedding(vector=(0.6, 0.8), prompt_token_ids=ids).as_json()}

    async def serve(self, request: Json) -> AsyncGenerator[Json, None]:
        self.asked.append(request)
        yield {"done": True}

    async def generate(self, request: Json) -> AsyncGenerator[Json, None]:
        self.asked.append(request)
        if request["max_tokens"] == 1:
            raise errors.PeerUnreachable("the node attic went away")
        yield {"waiting": "it has just started"}
        yield {"text": "bl", "token": 1}
        if request["max_tokens"] == 2:
            try:
                await trio.sleep_forever()
            finally:
                self.given_up.set()
        yield {"text": "ue", "token": 2}
        yield {"done": ANSWER.as_json()}


@asynccontextmanager
async def fake_node(folder: Path) -> AsyncIterator[FakeNode]:
    node = FakeNode()
    commands = {name: getattr(node, name) for name in ("status", "ready", "serve", "generate", "feedback", "embed")}
    Paths(folder).create()
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlService(Paths(folder).control_socket, commands).run)
        yield node
        nursery.cancel_scope.cancel()


def talk(folder: Path) -> None:
    """Every verb of the blocking client."""
    with meshnode.connect(folder) as node:
        assert node.generate("Why?", seed=1) == ANSWER
        with node.stream([{"role": "user", "content": "Hi"}], stop="\n") as pieces:
            assert [piece.text for piece in pieces] == ["bl", "ue"]
            assert pieces.answer == ANSWER
        status = node.status()
        assert (status.network, status.ready, status.peers) == ("home", True, ())
        node.wait_ready(2)
        with pytest.raises(errors.Declined, match=r"not ready after 0\.5 s: nobody serves layer 3"):
            node.wait_ready(0.5)
        node.serve("tiny", variant="int4")
        assert node.embed("a text") == Embedding(vector=(0.6, 0.8), prompt_token_ids=(3,))
        assert node.feedback(ANSWER, correct=False, label="red") == Judgement(answer="17", label="red")
        assert node.feedback("18", True).correct
        with pytest.raises(
            errors.BadRequest, match=r"can't be judged, because the node did not keep it.*keep_answers"
        ):
            node.feedback(replace(ANSWER, id=""), True)
        with pytest.raises(errors.PeerUnreachable, match="attic"):
            node.generate("Why?", max_tokens=1)
        with pytest.raises(errors.BadRequest, match="names are"):
            node.stop()
        said: list[str] = []
        stream = node.ask(meshnode.Question(prompt="x", max_tokens=2), waiting=said.append)
        assert (next(stream).text, said) == ("bl", ["it has just started"])
        stream.close()
        stream.close()
        with pytest.raises(errors.NodeError, match="closed before its answer was complete"):
            stream.whole()


async def test_the_blocking_client(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with fake_node(tmp_path) as node:
            await trio.to_thread.run_sync(talk, tmp_path)
            await node.given_up.wait()
    asked = [request["do"] for request in node.asked]
    assert asked == ["generate", "generate", "serve", "feedback", "feedback", "generate", "generate"]
    assert (node.asked[0]["seed"], node.asked[1]["stop"], node.asked[2]["model"]) == (1, ["\n"], "tiny")


async def atalk(folder: Path) -> None:
    """Every verb of the asynchronous client."""
    async with meshnode.aconnect(folder) as node:
        assert await node.generate("Why?", seed=1) == ANSWER
        async with node.stream([{"role": "user", "content": "Hi"}]) as pieces:
            assert [piece.text async for piece in pieces] == ["bl", "ue"]
            assert pieces.answer == ANSWER
        assert (await node.status()).network == "home"
        await node.wait_ready(2)
        with pytest.raises(errors.Declined, match="nobody serves layer 3"):
            await node.wait_ready(0.5)
        await node.serve("tiny")
        assert (await node.embed((1, 2))).prompt_token_ids == (1, 2)
        assert (await node.feedback(ANSWER, correct=False, label="red")).label == "red"
        with pytest.raises(errors.PeerUnreachable, match="attic"):
            await node.generate("Why?", max_tokens=1)
        with pytest.raises(errors.BadRequest):
            await node.stop()
        with anyio.move_on_after(0.1) as scope:
            await node.generate("Why?", max_tokens=2)
        assert scope.cancelled_caught
        left = node.stream("Why?", max_tokens=2)
        assert (await anext(left)).text == "bl"
    with pytest.raises(errors.NotRunning, match="There is no node in"):
        async with meshnode.aconnect(folder / "none"):
            pass


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
async def test_the_asynchronous_client(backend: str, tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with fake_node(tmp_path) as node:
            if backend == "trio":
                await atalk(tmp_path)
            else:
                await trio.to_thread.run_sync(lambda: anyio.run(atalk, tmp_path, backend=backend))
            await node.given_up.wait()


@pytest.mark.parametrize("data", [None, "text", "path"])
def test_where_no_node_is(data: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHNODE_DATA", str(tmp_path))
    where: dict[str | None, Any] = {None: None, "text": str(tmp_path), "path": tmp_path}
    with pytest.raises(errors.NotRunning, match=f"There is no node in {tmp_path} yet"):
        meshnode.connect(where[data])
    Paths(tmp_path).create()
    (tmp_path / "network" / "network.cbor").touch()
    with pytest.raises(errors.NotRunning, match=r"No node runs in .* Start it with: meshnode start --data"):
        meshnode.connect(where[data])


@pytest.mark.parametrize(
    ("line", "code"),
    [(b"", "gone"), (b'{"done', "gone"), (b"[]\n", "gone"), (None, "timeout")],
)
async def test_a_node_that_does_not_answer(line: bytes | None, code: str, tmp_path: Path) -> None:
    """It stops, breaks off, says nonsense, or hangs."""
    Paths(tmp_path).create()

    async def answer(stream: trio.SocketStream) -> None:
        if await stream.receive_some(1000):
            if line is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(line)

    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(Paths(tmp_path).control_socket))
    listener.listen(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(listener)])
        ask: Callable[[], Status] = lambda: Client(tmp_path).status(timeout=0.3)  # noqa: E731
        with pytest.raises(errors.NodeError) as caught:
            await trio.to_thread.run_sync(ask)
        assert caught.value.code == code
        if line is not None:
            with pytest.raises(errors.NodeError) as caught:
                async with meshnode.aconnect(tmp_path) as node:
                    await node.status()
            assert caught.value.code == code
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_silent_node_is_asked_whether_it_lives(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hangs in the middle of an answer; another one takes its time."""
    monkeypatch.setattr(client, "QUIET_S", 0.1)
    monkeypatch.setattr(client, "SECONDS", 0.5)
    Paths(tmp_path).create()
    asked = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        if b'"status"' in await stream.receive_some(1000):
            if hangs:
                await trio.sleep_forever()
            await stream.send_all(b'{"done": {}}\n')
            asked.set()
        else:
            await stream.send_all(b'{"text": "a", "token": 1}\n{"text": "b", "tok')
            await asked.wait()
            await stream.send_all(b'en": 2}\n')

    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(Paths(tmp_path).control_socket))
    listener.listen(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(listener)])
        pieces = Client(tmp_path).stream("Hello")
        assert (await trio.to_thread.run_sync(next, pieces)).text == "a"
        if hangs:
            with pytest.raises(errors.NodeError, match=r"did not answer within 0\.5 s"):
                await trio.to_thread.run_sync(next, pieces)
        else:
            assert (await trio.to_thread.run_sync(next, pieces)).token == 2
        pieces.close()
        nursery.cancel_scope.cancel()


def test_every_field_of_a_status_has_a_default() -> None:
    assert Status.read({}) == Status()
    assert len(fields(Status)) == len(Status().as_json())


def test_environment_is_the_command_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MESHNODE_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(errors.NotRunning, match=re.escape(os.fspath(tmp_path / "meshnode"))):
        meshnode.connect()
