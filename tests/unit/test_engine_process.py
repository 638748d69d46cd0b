"""What happens when the engine process, its parent, its files or the wire between them fail."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from meshnode.core.confinement import seccomp
from meshnode.core.confinement.limits import OUTPUT_BYTES
from meshnode.core.errors import Declined, EngineLost, ModelError
from meshnode.engine.graph_file import read_graph
from meshnode.engine.null_stage import NullStage
from meshnode.engine.port import StageSpec
from meshnode.engine.process import Deadlines, EngineProcess, load_request
from meshnode.engine.sessions import Sessions
from protocols.enginewire.messages import ANSWERS, REQUESTS, Loaded, Step
from protocols.frame import FrameReader, pack
from tests.conformance.check_engine import NULL, PROMPT, changed, enter, name, running, say
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


# ---------------------------------------------------------------- what it has


def highest_descriptor() -> int:
    """What an engine inherits keeps its number, high where many files are open, as in long runs of tests."""
    return max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("kind", ["null", "onnx"])
async def test_an_engine_has_nothing_of_its_node(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret of its environment, not its folder, no file but its own; limits on everything."""
    monkeypatch.setenv("MESHNODE_PASSPHRASE", "open sesame")
    monkeypatch.chdir(tmp_path)
    secret = (tmp_path / "node.key").open("w+b")  # Python's files are not inherited; this one is made to be
    os.set_inheritable(secret.fileno(), True)
    async with running(NULL if kind == "null" else tiny_models()["int4"].spec(0, 2)) as engine:
        about = Path(f"/proc/{pid_of(engine)}")
        environment = (about / "environ").read_bytes()
        assert b"sesame" not in environment and b"HOME=" not in environment
        assert str((about / "cwd").readlink()).endswith(" (deleted)")
        opened = {str(path.readlink()) for path in (about / "fd").iterdir()}
        assert not any(name.startswith(str(tmp_path)) for name in opened)
        used = {name for name in opened if name.startswith("/") and not name.startswith(("/dev/", "/tmp/"))}
        assert used == set()
        assert resource.prlimit(pid_of(engine), resource.RLIMIT_CORE) == (0, 0)
        assert resource.prlimit(pid_of(engine), resource.RLIMIT_FSIZE) == (OUTPUT_BYTES, OUTPUT_BYTES)
        for limit, most in ((resource.RLIMIT_DATA, 1 << 36), (resource.RLIMIT_NOFILE, highest_descriptor() + 128)):
            assert max(resource.prlimit(pid_of(engine), limit)) < most
        status = dict(line.split(":\t", 1) for line in (about / "status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1" and int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        if seccomp.known_processor():
            assert status["Seccomp"] == "2"
    secret.close()


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
    await refused(changed(spec, graph=empty), "empty is damaged: it is empty")
    await refused(changed(spec, groups={**spec.groups, "layer.1": cut_off}), "are cut off: .* model verify")
    await refused(changed(spec, groups={**spec.groups, "layer.1": empty}), "layer.1 at .*empty can't be read")
    await refused(changed(spec, groups={"layer.1": spec.groups["layer.1"]}), "weights layer.2, which this span")
    wrong = dataclasses.replace(spec.architecture, kv_heads=1)
    await refused(changed(spec, architecture=wrong), "the manifest says 1 of 16")
    await refused(changed(spec, last=9), "has no .*: it was made for another model")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux alone")
async def test_an_engine_that_takes_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it loads that is a sentence; a session that finds no memory is declined, and the engine goes on."""
    bound = "from meshnode.engine import enclosed\nenclosed.memory_bound = lambda load, weights: {}\n"
    (tmp_path / "sitecustomize.py").write_text(bound.format(1 << 20))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    spec = changed(tiny_models()["fp32"].spec(0, 4), max_kv_bytes=1 << 34)
    try:
        await refused(spec, "need more memory than their size allows for")
    except EngineLost as lost:  # seldom, glibc ends a process that onnxruntime left without memory
        assert "SIGABRT" in str(lost)
    (tmp_path / "sitecustomize.py").write_text(bound.format(1 << 26))
    big = dataclasses.replace(spec.architecture, context=1 << 20)
    async with running(changed(spec, architecture=big)) as engine:
        with pytest.raises(Declined, match=r"no 1073\.7 MB of memory left for the session") as caught:
            await enter(engine, 1, capacity=1 << 20)
        assert caught.value.code == "busy"
        await enter(engine, 2, capacity=64)
        assert (await say(engine, PROMPT, session=2)).token is not None


async def test_a_graph_that_opens_and_can_not_be_computed(tmp_path: Path) -> None:
    """A weight in the place of another one: kernels find out when they run. The engine says so when it loads."""
    spec = tiny_models()["int4"].spec(0, 4)
    model = read_graph(spec.graph)
    product = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    product.input[3] = product.input[0]  # zero points
    (tmp_path / "graph").write_bytes(model.SerializeToString())
    await refused(changed(spec, graph=tmp_path / "graph"), r"ONNX Runtime .* can't (open|compute) layers 0 to 3")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("Stepped(number=request.number, token=None, compute_us=1), bytes(60)", "with 60 bytes and the token None"),
        (
            "Stepped(number=request.number, token=1, compute_us=1, chances=(Chance(token=99, nano_nats=1),)), b''",
            "with 0 bytes and the token 1",
        ),
        ("Stepped(number=request.number, token=1 << 20, compute_us=1), b''", "with 0 bytes and the token 1048576"),
    ],
)
async def test_an_answer_that_is_not_due(
    answer: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine runs was made by others: rows of another size, or a token that is none, end it."""
    change = "from meshnode.engine import child\nfrom protocols.enginewire.messages import Stepped\n"
    change += "from protocols.pipe.messages import Chance\n"
    change += f"child._step = lambda sessions, request, frame: ({answer})\n"
    change += "import sys\nsys.exit(child.main(sys.argv[-2:])) if len(sys.argv) > 2 else None\n"
    (tmp_path / "sitecustomize.py").write_text(change)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    async with running(NULL) as engine:
        await enter(engine, capacity=64)
        with pytest.raises(EngineLost, match=f"it answered a step of 11 rows {words}"):
            await say(engine, PROMPT)


async def test_its_words_are_no_commands_to_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "import sys\nsys.stderr.write('\\x1b[2J\\u202eow' + chr(10))\n"
    (tmp_path / "sitecustomize.py").write_text(said)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(EngineLost, match=r"Its last words: \\x1b\[2J\\u202eow / engine: ") as caught:
        await EngineProcess(changed(NULL, kind="unknown")).start()
    assert str(caught.value).isprintable()


async def test_last_words() -> None:
    """stderr of a child that dies by itself is in the error, its last lines only."""
    engine = EngineProcess(changed(NULL, kind="unknown"))
    with pytest.raises(EngineLost, match=r"exit code 70\. Its last words: .*no engine of the kind 'unknown'"):
        await engine.start()


def test_a_step_that_finds_no_memory_is_declined() -> None:
    class Full:
        def run(self, position: int, data: object, *, prefill: bool, wanted: bool) -> np.ndarray[Any, Any]:
            raise MemoryError

    class Stage(NullStage):
        def open(self, *_: object, **_settings: object) -> Full:  # type: ignore[override]
            return Full()

    sessions = Sessions(Stage(layers=4, hidden=8, vocab=64), load_request(NULL))
    sessions.open(b"s", first=0, last=4, capacity=64, sampling=None, prompt=np.zeros(0, np.int32))
    with pytest.raises(Declined, match="no memory left for a step of 2 rows") as caught:
        sessions.step(b"s", position=0, rows=2, body=bytes(8), sample_after=True, prefill=True)
    assert caught.value.code == "busy" and caught.value.retry_ms > 0
