"""The engine as a child process: started, asked one thing at a time, killed when it misses a deadline.

No task and no thread belongs to it. Whoever asks sends the frame and waits for the answer itself, in turn, so a
one-row step costs two system calls and one wake-up on either side. A caller that is cancelled leaves its
request behind; the next one drops the late answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from io import FileIO
from typing import Final

import psutil
import trio

from meshnode.core.children import exited
from meshnode.core.confinement.environment import child_environment
from meshnode.core.errors import Declined, EngineLost, ModelError
from meshnode.core.printable import one_line
from meshnode.core.reasons import cause
from meshnode.engine.port import AdapterSpec, StageReport, StageSpec, StepResult
from meshnode.engine.requests import adapt_request, load_request, weight_bytes
from protocols.enginewire.machine import NodeSide
from protocols.enginewire.messages import (
    ANSWERS,
    BAD_INPUT,
    MAX_MESSAGE_BYTES,
    REQUESTS,
    AdapterLayer,
    Answer,
    Close,
    Done,
    Drop,
    Failed,
    Loaded,
    Open,
    Opened,
    Refused,
    Request,
    Step,
    Stepped,
)
from protocols.errors import RemoteProtocolError
from protocols.frame import Frame, FrameReader, pack
from protocols.ids import SessionId
from protocols.pipe.messages import Prefix, Sampling
from protocols.words import layers

_READ_BYTES: Final = 1 << 18
_TAIL_BYTES: Final = 4096  # of stderr, shown with the reason
_LOG_BYTES: Final = 1 << 18  # the file behind stderr is emptied above this
_STOP_S: Final = 1.5
_REAP_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long the engine may take before it is killed. Seconds."""

    load: float = 120.0
    load_bytes: float = 20e6  # bytes a second on top: a slow disk reads this fast
    call: float = 5.0  # open, close, and what every step may take at least
    margin: float = 50.0  # a step may take this many times what was measured after loading

    def of_load(self, weight_bytes: int) -> float:
        return self.load + weight_bytes / self.load_bytes

    def of_step(self, rows: int, report: StageReport, *, prefill: bool) -> float:
        singles = 1 if prefill else rows  # rows of an answer run one by one
        return self.call + self.margin * (singles * report.decode_us + rows * report.prefill_us) / 1e6


class EngineProcess:
    """Implements `Engine` (port.py)."""

    def __init__(self, spec: StageSpec, *, deadlines: Deadlines | None = None) -> None:
        self._spec = spec
        self._deadlines = deadlines or Deadlines()
        self._machine = NodeSide()
        self._turn = trio.StrictFIFOLock()
        self._reader = FrameReader(max_header=MAX_MESSAGE_BYTES)
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._frames: deque[Frame] = deque()
        self._unsent = memoryview(b"")
        self._deadline = 0.0  # of everything that was asked and is not answered
        self._owed: list[Close | Drop] = []  # what is to be freed before the next request
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._log: FileIO | None = None
        self._report: StageReport | None = None
        self._end = ""  # why the process is gone; empty while it is not
        self._last_words = ""  # the end of its stderr
        self._kept_bytes = 0

    @property
    def spec(self) -> StageSpec:
        return self._spec

    @property
    def report(self) -> StageReport | None:
        """What `start` found; None before."""
        return self._report

    @property
    def rss_bytes(self) -> int:
        if self._process is None or self._end:
            return 0
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    @property
    def kept_bytes(self) -> int:
        return 0 if self._end else self._kept_bytes

    async def start(self) -> StageReport:
        """Start the process and load the span. Call once.

        Raises EngineLost (it died, or took longer than its deadline) or ModelError (the files can't be used).
        If cancelled: the process is killed.
        """
        try:
            self._spawn()
        except OSError as error:
            raise EngineLost(f"The engine process can't be started: {cause(error)}.") from error
        try:
            seconds = self._deadlines.of_load(weight_bytes(self._spec))
            answer, _ = await self._ask(load_request(self._spec), seconds=seconds)
        except BaseException:
            await self._bury("its start was given up")
            raise
        assert isinstance(answer, Loaded) and self._process is not None  # the machine lets nothing else through
        self._report = StageReport(
            pid=self._process.pid,
            load_ms=answer.load_ms,
            weight_bytes=answer.weight_bytes,
            decode_us=answer.decode_us,
            prefill_us=answer.prefill_us,
            confined=answer.confined,
        )
        return self._report

    async def open(
        self,
        session: SessionId,
        *,
        first: int,
        last: int,
        capacity: int,
        sampling: Sampling | None,
        prompt: tuple[int, ...],
        adapter: str = "",
        pooled: bool = False,
        drawn: int = 0,
        prefixes: tuple[Prefix, ...] = (),
    ) -> int:
        """See port.py. If cancelled: the session may be open."""
        request = Open(
            number=0,
            session=session,
            first=first,
            last=last,
            capacity=capacity,
            sampling=sampling,
            adapter=adapter,
            pooled=pooled,
            drawn=drawn,
            prefixes=prefixes,
        )
        body = struct.pack(f"<{len(prompt)}i", *prompt)
        answer, _ = await self._ask(request, body, seconds=self._deadlines.call)
        assert isinstance(answer, Opened)  # the machine lets nothing else through
        if answer.rows not in (0, *(prefix.tokens for prefix in prefixes)):
            await self._bury(f"it says that {answer.rows} rows of a new session are filled, which is no prefix of it")
            raise self._lost()
        return answer.rows

    async def step(
        self,
        session: SessionId,
        *,
        position: int,
        rows: int,
        data: bytes,
        sample: bool,
        prefill: bool = False,
        mask: bytes = b"",
    ) -> StepResult:
        """See port.py."""
        if self._report is None:
            raise EngineLost("The engine was not started.")
        request = Step(
            number=0,
            session=session,
            position=position,
            rows=rows,
            sample=sample,
            prefill=prefill,
            mask=len(mask),
        )
        seconds = self._deadlines.of_step(rows, self._report, prefill=prefill)
        answer, body = await self._ask(request, data + mask if mask else data, seconds=seconds)
        assert isinstance(answer, Stepped)  # the machine lets nothing else through
        shape = self._spec.architecture
        tokens = (answer.token or 0, *(chance.token for chance in answer.chances))
        sizes = (0, 4 * rows * shape.hidden, 4 * shape.hidden if sample else 0)
        if len(body) not in sizes or not 0 <= min(tokens) <= max(tokens) < shape.vocab:
            # what runs there was made by others: what it says goes on to our peers only in the form that is due
            await self._bury(f"it answered a step of {rows} rows with {len(body)} bytes and the token {answer.token}")
            raise self._lost()
        return StepResult(data=body, token=answer.token, compute_us=answer.compute_us, chances=answer.chances)

    async def close(self, session: SessionId, *, keep: bool = False) -> None:
        """See port.py. A lost engine has no sessions: no error.

        If cancelled: the session is freed before the next request, whoever makes it.
        """
        await self._free(Close(number=0, session=session, keep=keep))

    async def adapt(self, adapter: AdapterSpec) -> None:
        """See port.py."""
        await self._ask(adapt_request(adapter), seconds=self._deadlines.of_load(weight_bytes(self._spec)))
        for layer, path in adapter.layers.items():
            try:
                content = await trio.to_thread.run_sync(path.read_bytes)
            except OSError as error:
                raise ModelError(
                    f"The file {path} of an adapter can't be read: {error.strerror or error}."
                ) from error
            seconds = self._deadlines.call + len(content) / self._deadlines.load_bytes
            await self._ask(AdapterLayer(number=0, adapter=adapter.name, layer=layer), content, seconds=seconds)

    async def drop(self, adapter: str) -> None:
        """See port.py."""
        await self._free(Drop(number=0, adapter=adapter))

    async def _free(self, request: Close | Drop) -> None:
        try:
            await self._ask(request, seconds=self._deadlines.call)
        except EngineLost:
            return
        except trio.Cancelled:
            self._owed.append(request)
            raise

    async def stop(self) -> None:
        """End the process: it finishes what it does now and is killed after 1.5 s. Takes 2 s at most."""
        if self._process is None or self._socket is None or self._end:
            return
        self._end = "it was stopped"
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        with trio.CancelScope(shield=True):
            await self._reap(_STOP_S)
        await self._bury("")

    async def wait_lost(self) -> str:
        """Wait until the process is gone, whyever; gives the reason. If cancelled: nothing has happened."""
        if self._process is not None:
            await exited(self._process)
            await self._bury("")
        return self._end

    # ------------------------------------------------------------ the process

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._socket = ours
        self._log = tempfile.TemporaryFile("a+b", buffering=0, prefix="meshnode-engine-")  # noqa: SIM115 lives on
        with theirs:
            # Not trio's open_process: it starts children from a worker thread, and the kernel counts the end of
            # that thread (10 s idle) as the death of the parent (PR_SET_PDEATHSIG).
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "meshnode.engine.child", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env=child_environment(os.environ),
            )

    async def _bury(self, why: str) -> None:
        """Kill the process unless it has ended, reap it, free what it held. Takes 2 s at most, never raises."""
        if self._process is None or self._socket is None or self._log is None:
            return
        with trio.CancelScope(shield=True):
            if self._process.poll() is None:
                self._end = self._end or why
                self._process.kill()
                await self._reap(_REAP_S)
        if self._socket.fileno() == -1:
            return  # another task was faster
        self._end = self._end or why or _ended(self._process.returncode)
        self._last_words = _tail(self._log.fileno())
        self._log.close()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    async def _reap(self, seconds: float) -> None:
        assert self._process is not None
        with trio.move_on_after(seconds):
            await exited(self._process)

    def _lost(self) -> EngineLost:
        """The error that tells how the process ended."""
        span = layers(self._spec.first, self._spec.last)
        said = f" Its last words: {self._last_words}" if self._last_words else ""
        return EngineLost(f"The engine of {span} is gone: {self._end or 'it was not started'}.{said}")

    # ------------------------------------------------------------ one request

    async def _ask(self, request: Request, body: bytes = b"", *, seconds: float) -> tuple[Answer, bytes]:
        """Send a request in its turn and wait for its answer. Raises EngineLost, Declined, ModelError.

        If cancelled: before its turn nothing has happened, afterwards the request is carried out.
        """
        await self._take_turn()
        try:
            if self._process is None or self._end:
                raise self._lost()
            if isinstance(request, Open):
                self._shorten_log()
            answer, out = await self._guarded(request, body, seconds)
        finally:
            self._turn.release()
        match answer:
            case Refused(code=code) if code == BAD_INPUT:
                raise RemoteProtocolError(one_line(answer.reason))
            case Refused():
                raise Declined(answer.code, one_line(answer.reason), retry_ms=answer.retry_ms)
            case Failed():
                await self._bury("it could not load the model")
                raise ModelError(one_line(answer.reason))
        return answer, out

    async def _take_turn(self) -> None:
        """First come, first served. Goes on at once when nobody waits: the exchange yields to other tasks."""
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()

    async def _guarded(self, request: Request, body: bytes, seconds: float) -> tuple[Answer, bytes]:
        """Free what is to be freed, then exchange; bury the engine if it dies or takes longer."""
        # what a cancelled caller left behind takes its time first
        self._deadline = max(self._deadline, trio.current_time()) + seconds
        with trio.CancelScope(deadline=self._deadline) as scope:
            try:
                while self._owed:
                    await self._exchange(self._owed[0], b"")
                    del self._owed[0]
                result = await self._exchange(request, body)
            except (OSError, EOFError, trio.ClosedResourceError):
                await self._reap(_REAP_S)
                await self._bury("")
                raise self._lost() from None
            except RemoteProtocolError as error:
                await self._bury(f"it broke the protocol ({error})")
                raise self._lost() from error
        if scope.cancelled_caught:
            what = type(request).__name__
            await self._bury(f"it had not answered a {what} after {seconds:.1f} s and was killed")
            raise self._lost()
        self._deadline = 0.0
        return result

    async def _exchange(self, request: Request, body: bytes) -> tuple[Answer, bytes]:
        """Send one request and read its answer, after everything that is still under way.

        The engine is never sent to while it may be sending itself: two full sockets would wait for each other.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._machine.waiting:
            await self._flush()
            await self._receive()
        self._unsent = memoryview(pack(REQUESTS.encode(self._machine.ask(request)), body))
        await self._flush()
        return await self._receive()

    async def _flush(self) -> None:
        """Send what is unsent. If cancelled: the rest stays unsent."""
        assert self._socket is not None
        while self._unsent:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)

    async def _receive(self) -> tuple[Answer, bytes]:
        """The next answer. If cancelled: nothing is lost."""
        assert self._socket is not None
        while not self._frames:
            await trio.lowlevel.wait_readable(self._socket)
            count = self._socket.recv_into(self._buffer)
            if not count:
                raise EOFError
            self._frames.extend(self._reader.feed(self._buffer[:count]))
        frame = self._frames.popleft()
        answer = ANSWERS.decode(frame.header)
        self._machine.answered(answer)
        if isinstance(answer, Done | Opened):
            self._kept_bytes = answer.kept_bytes
        return answer, frame.body

    def _shorten_log(self) -> None:
        assert self._log is not None
        if os.fstat(self._log.fileno()).st_size > _LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)


def _ended(code: int | None) -> str:
    """How a process ended, from its exit code."""
    if code is None:
        return "it was killed but does not end"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"


def _tail(log: int) -> str:
    """The last lines of a file."""
    size = os.fstat(log).st_size
    data = os.pread(log, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    lines = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
    return one_line(" / ".join(lines[-3:]))
