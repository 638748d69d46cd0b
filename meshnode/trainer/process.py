"""The trainer as a child process: started for the first job, kept for the next ones, killed when one is cancelled.

Pausing it is SIGSTOP: it takes effect in the middle of whatever it computes. No torch here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Final

import psutil
import trio

from meshnode.core.children import exited, signal_name
from meshnode.core.confinement.environment import child_environment
from meshnode.core.errors import DiskError, TrainerLost
from meshnode.trainer import wire
from meshnode.trainer.port import (
    EvaluateJob,
    Evaluation,
    LocalJob,
    Report,
    Step,
    Trained,
    TrainedLocally,
    TrainJob,
)
from protocols.errors import MeshError

_READ_BYTES: Final = 1 << 16
_MOST_LINE: Final = 1 << 26  # of an answer: the losses of all steps
_TAIL_BYTES: Final = 4096
_STOP_S: Final = 1.5


def _ignore(_step: Step) -> None: ...


class TrainerProcess:
    """Implements `Trainer` (port.py)."""

    def __init__(self, *, threads: int = 1) -> None:
        self._threads = threads
        self._turn = trio.StrictFIFOLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: trio.lowlevel.FdStream | None = None
        self._answers: trio.lowlevel.FdStream | None = None
        self._log: FileIO | None = None
        self._unread = bytearray()
        self._paused = False

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def pids(self) -> tuple[int, ...]:
        """Its process, while there is one."""
        return () if self._process is None else (self._process.pid,)

    @property
    def rss_bytes(self) -> int:
        if self._process is None:
            return 0
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def train(self, job: TrainJob, report: Report = _ignore) -> Trained:
        """See port.py."""
        await _made(job.folder)
        done = await self._ask(job, job.folder, report)
        with _sensible():
            vector = wire.read_vector(job.folder / wire.VECTOR)
            job.frame.split(vector)
            return Trained(vector=vector, optimiser=Path(done["optimiser"]), **_course(done))

    async def train_locally(self, job: LocalJob, report: Report = _ignore) -> TrainedLocally:
        """See port.py."""
        await _made(job.folder)
        done = await self._ask(job, job.folder, report)
        with _sensible():
            return TrainedLocally(adapter=Path(done["adapter"]), **_course(done))

    async def evaluate(self, job: EvaluateJob) -> tuple[Evaluation, ...]:
        """See port.py."""
        with tempfile.TemporaryDirectory(prefix="meshnode-evaluate-") as folder:
            done = await self._ask(job, Path(folder), _ignore)
            with _sensible():
                return wire.evaluations_from_files(done, Path(folder), job)

    def pause(self) -> None:
        """See port.py."""
        self._paused = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """See port.py."""
        self._paused = False
        self._signal(signal.SIGCONT)

    async def aclose(self) -> None:
        """See port.py."""
        with trio.CancelScope(shield=True):
            await self._end()

    # ------------------------------------------------------------ one job

    async def _ask(self, job: wire.Job, folder: Path, report: Report) -> wire.Json:
        async with self._turn:
            line = await trio.to_thread.run_sync(wire.pack_job, job, folder)
            if self._process is not None and self._process.poll() is not None:
                await self._end()  # it was killed while it had nothing to do
            if self._process is None:
                self._spawn()
            answer: wire.Json | MeshError | None = None
            try:
                answer = await self._exchange(line, report)
            finally:
                if answer is None:  # it is in the middle of something, or gone
                    with trio.CancelScope(shield=True):
                        await self._end()
        if isinstance(answer, MeshError):
            raise answer
        return answer

    async def _exchange(self, line: bytes, report: Report) -> wire.Json | MeshError:
        """Send a job; its answer. Raises TrainerLost."""
        assert self._requests is not None
        try:
            await self._requests.send_all(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise await self._lost() from None
        while isinstance(message := await self._receive(), Step):
            report(message)
        return message

    async def _receive(self) -> Step | wire.Json | MeshError:
        """What it says next. Raises TrainerLost when it is gone, or says what makes no sense."""
        assert self._answers is not None
        try:
            while b"\n" not in self._unread:
                data = await self._answers.receive_some(_READ_BYTES)
                if not data or len(self._unread) > _MOST_LINE:
                    raise ValueError("no line any more")
                self._unread += data
            line, _, self._unread = self._unread.partition(b"\n")
            return wire.unpack_answer(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ValueError):
            raise await self._lost() from None

    # ------------------------------------------------------------ the process

    def _spawn(self) -> None:
        self._log = tempfile.TemporaryFile("a+b", buffering=0, prefix="meshnode-trainer-")  # noqa: SIM115 lives on
        try:
            # subprocess and not trio's open_process, as in engine/process.py
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "meshnode.trainer", str(self._threads), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=child_environment(os.environ),
            )
        except OSError as error:
            self._log.close()
            raise TrainerLost(f"The trainer's process can't be started: {error}.") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = trio.lowlevel.FdStream(os.dup(self._process.stdin.fileno()))
        self._answers = trio.lowlevel.FdStream(os.dup(self._process.stdout.fileno()))
        self._process.stdin.close()
        self._process.stdout.close()
        self._unread.clear()
        if self._paused:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    async def _lost(self) -> TrainerLost:
        """Kill what is left of it; the error that tells how it ended."""
        with trio.CancelScope(shield=True):
            process, log = self._process, self._log
            assert process is not None and log is not None
            with trio.move_on_after(_STOP_S):
                await exited(process)
            status = process.poll()
            said = _tail(log)
            await self._end()
        how = "it broke the protocol and was killed"
        if status is not None:
            how = f"it was ended by {signal_name(-status)}" if status < 0 else f"it ended with the code {status}"
        return TrainerLost(f"The trainer is gone: {how}.{said and ' Its last words: '}{said}")

    async def _end(self) -> None:
        """Kill it, reap it, free what it held. Nothing is lost but the step under way: the rest is on disk."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.kill()  # a paused one, too
        with trio.move_on_after(_STOP_S):
            await exited(process)
        for stream in (self._requests, self._answers):
            assert stream is not None
            await stream.aclose()
        assert self._log is not None
        self._log.close()


def _course(done: wire.Json) -> dict[str, Any]:
    """What both kinds of training tell."""
    return {
        "losses": tuple(float("nan") if loss is None else float(loss) for loss in done["losses"]),
        "seconds": float(done["seconds"]),
        "skipped": int(done["skipped"]),
        "resumed": int(done["resumed"]),
    }


@contextlib.contextmanager
def _sensible() -> Iterator[None]:
    """What runs there has read what others made, so its answers are looked at like theirs. Raises TrainerLost."""
    try:
        yield
    except (KeyError, TypeError, ValueError, MeshError) as error:
        raise TrainerLost(f"The trainer's answer makes no sense ({type(error).__name__}: {error}).") from error


async def _made(folder: Path) -> None:
    try:
        await trio.to_thread.run_sync(lambda: folder.mkdir(mode=0o700, parents=True, exist_ok=True))
    except OSError as error:
        raise DiskError(f"{folder} can't be made: {error.strerror or error}.") from error


def _tail(log: FileIO) -> str:
    """The last line of its stderr."""
    size = os.fstat(log.fileno()).st_size
    lines = os.pread(log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "".join(c for c in said if c.isprintable())[:300]
