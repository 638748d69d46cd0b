"""A model's tokenizer in a process of its own, which has limits on time and memory (`limits.py`) and sees no files.

One process per model, shared by all questions; they are answered by forks of it (`child.py`), one at a time each.
What a tokenizer or a template does there costs at most the question that met it. Tokens become text here, from plain
data (`decoding.py`), so that nothing waits for the process between two tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import trio

from meshnode.core.children import exited, signal_name
from meshnode.core.confinement.environment import child_environment
from meshnode.core.errors import Declined, ModelError, TokenizerLost
from meshnode.core.reasons import cause
from meshnode.text import wire
from meshnode.text.channel import READ_BYTES, receive, send
from meshnode.text.decoding import Decoder, TextStream
from meshnode.text.guide import ForkGuide
from meshnode.text.limits import Limits
from meshnode.text.port import MAX_SPECIALS_BYTES, MAX_TEMPLATE_BYTES, MAX_TOKENIZER_BYTES, NO_GRAMMAR, TokenizerFiles
from meshnode.text.question import Turn
from meshnode.text.tools import HERMES, Tool
from meshnode.text.vocabulary import Vocabulary
from protocols.errors import RemoteProtocolError
from protocols.frame import Frame

_TAIL_BYTES: Final = 2048  # of its stderr, shown with the reason
_STOP_S: Final = 1.5
_ATTEMPTS: Final = 2  # of a question whose fork somebody killed
_IDLE: Final = 2  # forks that wait for the next question
_KEPT: Final = ("TZ",)  # templates tell the date


async def open_tokenizer(files: TokenizerFiles, limits: Limits = Limits()) -> TokenizerProcess:
    """Start the process and have it read the files. See `port.OpenTokenizer`.

    If cancelled: the process is killed.
    """
    tokenizer = TokenizerProcess(files, limits)
    try:
        await tokenizer.load()
    except BaseException:
        await tokenizer.aclose()
        raise
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Fork:
    """Where questions are asked."""

    number: int
    channel: socket.socket


class TokenizerProcess:
    """Implements `Tokenizer` (port.py)."""

    def __init__(self, files: TokenizerFiles, limits: Limits) -> None:
        self._files = files
        self._limits = limits
        self._numbers = itertools.count(1)
        self._places = trio.CapacityLimiter(limits.at_once)
        self._vocabulary = Vocabulary(())
        self._decoder = Decoder(None)
        self.style = HERMES  # of calls, until the template is read
        self.confined: tuple[str, ...] = ()  # parts of the confinement that held at the last answer
        self._closed = False
        self._idle: list[_Fork] = []
        self._taking = trio.Lock()  # the sockets of forks come one after the other
        self._ordered = False  # whether a fork is there, or on its way
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._control = ours
        self._log: FileIO = tempfile.TemporaryFile("w+b", buffering=0, prefix="meshnode-text-")  # noqa: SIM115 lives on
        with theirs:
            try:
                # subprocess and not trio's open_process, as in engine/process.py
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-s", "-m", "meshnode.text.child", str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=[theirs.fileno()],
                    env=child_environment(os.environ) | {key: os.environ[key] for key in _KEPT if key in os.environ},
                )
            except OSError as error:
                ours.close()
                self._log.close()
                raise TokenizerLost(f"the tokenizer's process can't be started: {cause(error)}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lost(self) -> bool:
        return self._closed or self._process.poll() is not None

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """See port.py."""
        return TextStream(self._vocabulary, self._decoder, prompt)

    async def encode(self, text: str) -> tuple[int, ...]:
        """See port.py."""
        return _ids(await self._ask(wire.pack_text(text), "tokenizer"))

    async def chat(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """See port.py."""
        return _ids(await self._ask(wire.pack_turns(turns, tools), "chat template"))

    async def render(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """See port.py."""
        answer = await self._ask(wire.pack_turns(turns, tools, shown=True), "chat template")
        if not isinstance(answer, wire.Rendered):
            raise ModelError(f"the chat template of {self._files.model} gave tokens where a text was asked for")
        return answer.text

    async def guide(self, kind: str, text: bytes) -> ForkGuide:
        """See port.py."""
        if not self._files.eos:
            raise Declined(NO_GRAMMAR, f"the tokenizer of {self._files.model} was opened without grammars")
        fork = await self._new_fork()

        def end() -> None:
            fork.channel.close()
            self._order(wire.STOP, fork.number)

        guide = ForkGuide(fork.channel, self._files.vocab, self._limits, end)
        try:
            self._order_fork()  # for the next question
            await guide.begin(kind, text)
        except BaseException:
            guide.close()
            raise
        return guide

    async def aclose(self) -> None:
        """See port.py. Takes 2 s at most."""
        if self._closed:
            return
        self._closed = True
        for fork in self._idle:
            fork.channel.close()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_STOP_S):
                await exited(self._process)
            if self._process.poll() is None:
                self._process.kill()
                await exited(self._process)
        trio.lowlevel.notify_closing(self._control)
        self._control.close()
        self._log.close()

    # ------------------------------------------------------------ loading

    async def load(self) -> None:
        """Have the process read the files. Call once. Raises ModelError, TokenizerLost."""
        files, name = self._files, self._files.model
        load = wire.Load(
            tokenizer=_size(files.tokenizer, MAX_TOKENIZER_BYTES, "tokenizer.json", name) or 0,
            specials=_size(files.specials, MAX_SPECIALS_BYTES, "special_tokens_map.json", name),
            template=_size(files.template, MAX_TEMPLATE_BYTES, "chat_template.jinja", name),
            vocab=files.vocab,
            eos=files.eos,
            limits=self._limits,
        )
        frame: Frame | None = None
        with trio.move_on_after(self._limits.load_s) as scope:
            with contextlib.suppress(OSError):  # it ended while it was told: its answer, or its end, says why
                await send(self._control, wire.pack_load(load))
                for path in (files.tokenizer, files.specials, files.template):
                    if path is not None:
                        await self._send_file(path)
            frame = await receive(self._control, wire.MAX_LOADED)
        if scope.cancelled_caught:
            raise ModelError(
                f"the tokenizer of {name} can't be used: it took longer than {self._limits.load_s:.0f} s to read"
            )
        if frame is None:
            raise await self._end_of_load()
        try:
            decoder, self.style = wire.read_loaded(frame)
            self._decoder = Decoder(decoder)
            self._vocabulary = Vocabulary.unpack(frame.body)
            self._order_fork()
        except ModelError as error:
            raise ModelError(f"the tokenizer of {name} can't be used: {error}") from error
        except (RemoteProtocolError, ValueError) as error:
            raise ModelError(
                f"the tokenizer of {name} can't be used: its process broke the rules: {error}"
            ) from error

    async def _send_file(self, path: Path) -> None:
        """In pieces: the node never holds the whole."""
        async with await trio.open_file(path, "rb") as file:
            while data := await file.read(READ_BYTES):
                await send(self._control, data)

    async def _end_of_load(self) -> ModelError | TokenizerLost:
        """What to say when the process ended while it read the files."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_STOP_S):
                await exited(self._process)
        code, name = self._process.poll(), self._files.model
        if code == -signal.SIGKILL:
            return TokenizerLost(f"the process that reads the tokenizer of {name} was killed")
        if code == -signal.SIGXCPU:
            reason = f"reading it takes more than {self._limits.load_cpu_s} s of computing"
        elif code is not None and code < 0:
            reason = (
                f"reading it takes more than {self._limits.load_bytes >> 20} MiB of memory, or fails badly "
                f"({signal_name(-code)})"
            )
        else:
            reason = f"its process ended ({code}). {self._last_words()}".rstrip()
        return ModelError(f"the tokenizer of {name} can't be used: {reason}")

    def _last_words(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        data = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        return " / ".join([line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()][-2:])

    # ------------------------------------------------------------ one question

    async def _ask(self, question: bytes, what: str) -> wire.Tokens | wire.Rendered | wire.Mask:
        """Ask a fork; a second one if somebody killed the first. Raises Declined, ModelError, TokenizerLost."""
        died = wire.Died(0)
        async with self._places:
            for _ in range(_ATTEMPTS):
                answer = await self._asked(question, what)
                if isinstance(answer, wire.Tokens):
                    self.confined = answer.confined
                if not isinstance(answer, wire.Died):
                    return answer
                died = answer
                if died.signal != signal.SIGKILL:
                    break
        if died.signal == signal.SIGXCPU:
            reason = f"computed for more than {self._limits.cpu_s} s"
        elif died.signal == signal.SIGKILL:
            reason = "was killed twice; the machine may be out of memory"
        else:
            how = signal_name(died.signal) if died.signal else "it ended without a word"
            reason = f"used more than {self._limits.bytes >> 20} MiB of memory, or failed badly ({how})"
        raise Declined("bad-request", f"the {what} of {self._files.model} {reason} on this text; it was ended")

    async def _asked(self, question: bytes, what: str) -> wire.Tokens | wire.Rendered | wire.Mask | wire.Died:
        """One attempt, in a fork that does nothing else meanwhile."""
        fork = self._idle_fork() or await self._new_fork()
        kept = ended = False
        try:
            with trio.move_on_after(self._limits.wall_s):
                with contextlib.suppress(OSError):  # it has died: the obituary says how
                    await send(fork.channel, question)
                frame = await receive(fork.channel, wire.MAX_ANSWER)
                ended = True
                if frame is None:  # whoever killed it killed what would have told us, too
                    return wire.Died(signal.SIGKILL)
                answer = wire.read_answer(frame)
                kept = isinstance(answer, wire.Tokens | wire.Rendered) and answer.more and len(self._idle) < _IDLE
                return answer
        except RemoteProtocolError as error:
            ended = False
            raise ModelError(f"the {what} of {self._files.model} broke the rules of its process: {error}") from error
        finally:
            if kept and not self._closed:
                self._idle.append(fork)
            else:
                fork.channel.close()  # a fork that waits ends with that
                if not ended:
                    self._order(wire.STOP, fork.number)
                if not self._idle:
                    self._order_fork()
        raise Declined(
            "bad-request",
            f"the {what} of {self._files.model} took longer than {self._limits.wall_s:.0f} s on this text; "
            "it was ended",
        )

    def _idle_fork(self) -> _Fork | None:
        """One that has answered before, and lives."""
        while self._idle:
            fork = self._idle.pop()
            try:
                fork.channel.recv(1)
            except BlockingIOError:
                return fork
            except OSError:
                pass
            fork.channel.close()  # its obituary has come
        return None

    async def _new_fork(self) -> _Fork:
        """The fork that was ordered before, or a new one. Raises TokenizerLost."""
        async with self._taking:
            self._order_fork()
            while True:
                try:
                    data, sockets, _, _ = socket.recv_fds(self._control, wire.ORDER.size, 1)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._control)
                except (OSError, trio.ClosedResourceError):
                    raise self._gone() from None
            if len(data) != wire.ORDER.size or not sockets:
                raise self._gone()
            self._ordered = False
            try:
                channel = socket.socket(fileno=sockets[0])
            except OSError:  # something else than a socket
                os.close(sockets[0])
                raise self._gone() from None
            channel.setblocking(False)
            return _Fork(wire.ORDER.unpack(data)[1], channel)

    def _order_fork(self) -> None:
        """Unless one is there or on its way."""
        if not self._ordered:
            self._ordered = self._order(wire.FORK, next(self._numbers) & 0xFFFFFFFF)

    def _order(self, what: bytes, number: int) -> bool:
        """Tell the process; whether it could be told. Its socket takes many orders: if it is full, it hangs."""
        try:
            self._control.send(wire.ORDER.pack(what, number))
        except BlockingIOError:
            self._process.kill()
        except OSError:  # it has gone, and whoever asks hears that
            return False
        return True

    def _gone(self) -> TokenizerLost:
        return TokenizerLost(f"the process of the tokenizer of {self._files.model} has ended; ask again")


def _ids(answer: wire.Tokens | wire.Rendered | wire.Mask) -> tuple[int, ...]:
    """Raises ModelError."""
    if not isinstance(answer, wire.Tokens):
        raise ModelError("the tokenizer gave no tokens where they were asked for")
    return answer.ids


def _size(path: Path | None, most: int, file: str, model: str) -> int | None:
    """Bytes of a file. Raises ModelError."""
    if path is None:
        return None
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{file} of {model} can't be read: {cause(error)}") from error
    if size > most:
        raise ModelError(f"{file} of {model} has {size} bytes; {most} are possible")
    return size
