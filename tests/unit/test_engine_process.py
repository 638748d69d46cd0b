"""What happens when the engine process, its parent, its files or the wire between them fail."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from meshnode.core.errors import EngineLost, ModelError
from meshnode.engine.port import StageSpec
from meshnode.engine.process import Deadlines, EngineProcess, load_request
from protocols.enginewire.messages import ANSWERS, REQUESTS, Loaded, Step
from protocols.frame import FrameReader, pack
from tests.conformance.check_engine import NULL, changed, enter, name, running, say
from tests.conformance.tiny_model import tiny_models


def pid_of(engine: EngineProcess) -> int:
    assert engine.report is not None
    return engine.report.pid


async def ask(engine: EngineProcess) -> None:
    await enter(engine, capacity=64)
    await say(engine, (1, 2))


async def test_report() -> None:
    async with running(NULL) as engine:
        report = engine.report
        assert report is not None and report.pid != os.getpid()
        assert report.decode_us > 0 and report.prefill_us >= 0 and report.weight_bytes == 0


async def test_killed_while_idle() -> None:
    async with running(NULL) as engine:
        await ask(engine)
        os.kill(pid_of(engine), signal.SIGKILL)
        with trio.fail_after(1):
            assert await engine.wait_lost() == "it was killed by SIGKILL"
        assert engine.rss_bytes == 0
        with pytest.raises(EngineLost, match="layers 0 to 3 is gone: it was killed by SIGKILL"):
            await ask(engine)


async def test_killed_during_a_step() -> None:
    async with running(NULL) as engine:
        await ask(engine)
        os.kill(pid_of(engine), signal.SIGSTOP)
        async with trio.open_nursery() as nursery:

            async def step() -> None:
                with pytest.raises(EngineLost, match="SIGKILL"):
                    await say(engine, (3,), 2)

            nursery.start_soon(step)
            nursery.start_soon(step)  # waits for its turn
            await trio.testing.wait_all_tasks_blocked()
            os.kill(pid_of(engine), signal.SIGKILL)
            with trio.fail_after(1):
                await engine.wait_lost()


async def test_a_step_that_hangs_is_killed_at_its_deadline() -> None:
    async with running(NULL, deadlines=Deadlines(call=0.3)) as engine:
        await ask(engine)
        os.kill(pid_of(engine), signal.SIGSTOP)
        with trio.fail_after(5), pytest.raises(EngineLost, match=r"not answered a Step after 0\.\d s and was killed"):
            await say(engine, (3,), 2)
        with pytest.raises(EngineLost, match="not answered a Step"):
            await ask(engine)


async def test_a_start_that_hangs_is_killed_at_its_deadline() -> None:
    engine = EngineProcess(NULL, deadlines=Deadlines(load=0.0))
    with trio.fail_after(5), pytest.raises(EngineLost, match=r"not answered a Load after 0\.0 s"):
        await engine.start()
    assert "Load" in await engine.wait_lost()


async def test_a_cancelled_start_leaves_no_process() -> None:
    engine = EngineProcess(NULL)
    with trio.CancelScope() as scope:
        scope.cancel()
        await engine.start()
    assert scope.cancelled_caught
    with trio.fail_after(5):
        assert await engine.wait_lost() == "its start was given up"


async def test_a_cancelled_caller_does_not_spare_a_hung_engine() -> None:
    """The time of a step that nobody waits for counts for the one who comes next."""
    async with running(NULL, deadlines=Deadlines(call=0.3)) as engine:
        await ask(engine)
        os.kill(pid_of(engine), signal.SIGSTOP)
        with trio.move_on_after(0.05):
            await say(engine, (3,), 2)
        with trio.fail_after(5), pytest.raises(EngineLost, match="was killed"):
            await say(engine, (3,), 3)


async def test_the_next_caller_gets_its_own_answer() -> None:
    """A cancelled step leaves a large request and a large answer under way; both are carried away first."""
    spec = changed(NULL, last=2, architecture=dataclasses.replace(NULL.architecture, hidden=4096, context=512))
    async with running(spec) as engine:
        await engine.open(name(1), first=1, last=2, capacity=512, sampling=None, prompt=())
        rows = np.arange(400 * 4096, dtype="<f4").reshape(400, 4096) % 1000  # 6.5 MB either way
        expected = await engine.step(name(1), position=0, rows=400, data=rows.tobytes(), sample=False)
        for turns in (1, 2, 3, 4):  # cancelled at different points of the exchange
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_after_turns, turns, nursery.cancel_scope)
                await engine.step(name(1), position=0, rows=400, data=rows[::-1].tobytes(), sample=False)
            got = await engine.step(name(1), position=0, rows=400, data=rows.tobytes(), sample=False)
            assert got.data == expected.data


async def cancel_after_turns(turns: int, scope: trio.CancelScope) -> None:
    for _ in range(turns):
        await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


async def test_stop_lets_a_running_step_end() -> None:
    async with running(NULL) as engine:
        await ask(engine)
        tokens: list[int | None] = []

        async def step() -> None:
            tokens.append((await say(engine, range(20), 2)).token)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step)
            await trio.testing.wait_all_tasks_blocked()
            await engine.stop()
        assert len(tokens) == 1 and tokens[0] is not None


# ---------------------------------------------------------------- the child on its own


def run_child(parent: int | None = None) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "meshnode.engine.child", str(theirs.fileno()), str(parent or os.getpid())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    ours.settimeout(10)
    return process, ours


def talk(sock: socket.socket, data: bytes) -> list[object]:
    """Send bytes, close our side, and read every answer until the child closes its own."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    reader, out = FrameReader(), []
    while data := sock.recv(65536):
        out += [ANSWERS.decode(frame.header) for frame in reader.feed(data)]
    return out


LOAD = REQUESTS.encode(dataclasses.replace(load_request(NULL), number=1))
EARLY = REQUESTS.encode(Step(number=1, session=bytes(16), position=0, rows=1, sample=False, prefill=False))
TWICE = REQUESTS.encode(dataclasses.replace(load_request(NULL), number=2))
SKIPPED = REQUESTS.encode(Step(number=9, session=bytes(16), position=0, rows=1, sample=False, prefill=False))


@pytest.mark.parametrize(
    ("data", "answers", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", [], b"the limits are"),
        (pack(b"\xff\x00"), [], b"canonical"),
        (pack(b"", b"x"), [], b"message"),
        (pack(EARLY), [], b"a Step to an engine that is new"),
        (pack(LOAD) + pack(TWICE), [Loaded], b"a Load to an engine that is ready"),
        (pack(LOAD) + pack(SKIPPED), [Loaded], b"sent request 9, 2 is due"),
        (pack(LOAD) + pack(LOAD)[:-5], [Loaded], b"closed in the middle of a frame"),
    ],
)
def test_garbage_ends_the_child_with_a_sentence(data: bytes, answers: list[type], words: bytes) -> None:
    process, sock = run_child()
    with process, sock:
        assert [type(a) for a in talk(sock, data)] == answers
        assert process.wait(10) == 70
        assert process.stderr is not None
        said = process.stderr.read()
        assert words in said and b"Traceback" not in said


def test_a_closed_socket_ends_the_child_quietly() -> None:
    process, sock = run_child()
    with process, sock:
        assert [type(a) for a in talk(sock, pack(LOAD))] == [Loaded]
        assert process.wait(10) == 0
        assert process.stderr is not None and process.stderr.read() == b""


@pytest.mark.skipif(
    sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's; elsewhere the closed socket does it"
)
def test_a_child_that_comes_too_late_ends() -> None:
    process, sock = run_child(parent=1)  # its parent is somebody else now
    with process, sock:
        assert process.wait(10) == 0


PARENT = """
import sys, time, trio
from meshnode.engine.process import EngineProcess
from tests.conformance.check_engine import NULL

async def main():
    engine = EngineProcess(NULL)
    report = await engine.start()
    print(report.pid, flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a grandchild with a pidfd")
def test_the_death_of_the_parent_ends_the_child() -> None:
    """Even of one that had stopped: no end of file reaches a stopped child, the kernel's signal does."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=Path.cwd()) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        descriptor = os.pidfd_open(child)
        os.kill(child, signal.SIGSTOP)
        parent.kill()
        parent.wait(10)

        async def ended() -> None:
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(descriptor)

        trio.run(ended)
        os.close(descriptor)


# ---------------------------------------------------------------- files


async def refused(spec: StageSpec, words: str) -> None:
    engine = EngineProcess(spec)
    with trio.fail_after(30), pytest.raises(ModelError, match=words):
        await engine.start()
    assert engine.rss_bytes == 0


async def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    tiny = tiny_models()["int4"]
    spec = tiny.spec(1, 3)
    cut_off = tmp_path / "layer.1.safetensors"
    cut_off.write_bytes(spec.groups["layer.1"].read_bytes()[:-2000])
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    garbage = tmp_path / "graph.onnx"
    garbage.write_bytes(b"\xff" * 1000)
    await refused(changed(spec, graph=tmp_path / "none"), "none can't be read: No such file")
    await refused(changed(spec, graph=garbage), "graph.onnx is damaged")
    await refused(changed(spec, graph=empty), "empty has no")
    await refused(changed(spec, groups={**spec.groups, "layer.1": cut_off}), "are cut off: .* model verify")
    await refused(changed(spec, groups={**spec.groups, "layer.1": empty}), "layer.1 at .*empty can't be read")
    await refused(changed(spec, groups={"layer.1": spec.groups["layer.1"]}), "weights layer.2, which this span")
    wrong = dataclasses.replace(spec.architecture, kv_heads=1)
    await refused(changed(spec, architecture=wrong), "the manifest says 1 of 16")
    await refused(changed(spec, last=9), "has no .*: it was made for another model")


async def test_last_words() -> None:
    """stderr of a child that dies by itself is in the error, its last lines only."""
    engine = EngineProcess(changed(NULL, kind="unknown"))
    with pytest.raises(EngineLost, match=r"exit code 70\. Its last words: .*no engine of the kind 'unknown'"):
        await engine.start()
