"""The tokenizer's process: `python -m meshnode.text.child FD PARENT` reads a model's tokenizer and chat template.

It answers no question itself: that is done by forks of it, each with limits of its own and one question at a time, so
that a text or a template that runs wild costs its asker an error and nobody else anything. The node orders a fork
before there is a question for it, and talks to it directly. A fork that has used little of its limits takes another
question, since its caches are warm then. Forks see neither each other's questions nor the node.

No threads, no event loop, no files; it ends when the node closes the socket or dies, whatever the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Final

from meshnode.core.confinement.confine import confine, libraries_only
from meshnode.core.errors import Declined, ModelError
from meshnode.core.memory import give_back
from meshnode.text import wire
from meshnode.text.limits import Limits, for_good, limit_computing, limit_memory, no_limit_of_computing
from protocols.frame import PREFIX_BYTES, Frame

if __name__ == "__main__":
    time.tzset()  # reads what the device says about its time zone, while files can be read
    libraries_only()

# Not before: what is foreign is read by these.
from meshnode.text.grammar import Walk
from meshnode.text.tokenizer import ModelText

for _lazy in ("jinja2.constants", "jinja2.debug", "pprint", "textwrap", "urllib.parse", "_strptime"):
    importlib.import_module(_lazy)  # is imported when it is used, and then no file can be read any more

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> int:
    """Serve until the node closes the socket. The exit code is 0 then, 1 when the files can't be used."""
    descriptor, parent = int(arguments[0]), int(arguments[1])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the node decides
    with socket.socket(fileno=descriptor) as control:
        try:
            text, limits = _load(control)
        except (ConnectionError, EOFError):
            return 0  # the node has gone, or has thought better of it
        if text is None:
            return 1
        _Nursery(control, text, limits).run()
        return 0


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies; the end of the socket does it elsewhere."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(0)


def _load(control: socket.socket) -> tuple[ModelText | None, Limits]:
    """Read the files of the model and tell the node about them; None when they can't be used."""
    load = wire.read_load(_receive(control, wire.MAX_HEADER))
    limits = load.limits
    sizes = (load.tokenizer, load.specials, load.template)
    tokenizer, specials, template = (None if size is None else _exactly(control, size) for size in sizes)
    text = ModelText(limits)
    try:
        limit_memory(limits.load_bytes)
        limit_computing(limits.load_cpu_s)
        text.read_tokenizer(tokenizer or b"", specials)
        if load.eos:
            text.read_grammars(tokenizer or b"", load.vocab, load.eos)
        tokenizer = None
        vocabulary = text.vocabulary(load.vocab)
        give_back()
        limit_memory(limits.template_bytes)
        text.read_template(template)
        text.warm_up()  # what is built when it is first used is built once, and not in each fork
        no_limit_of_computing()
        control.sendall(wire.pack_loaded(text.decoder(), text.style, vocabulary.pack()))
    except MemoryError:
        wanted = limits.load_bytes >> 20
        error = ModelError(f"the model's tokenizer or chat template wants more than {wanted} MiB of memory")
        control.sendall(wire.pack_error(error))
        return None, limits
    except ModelError as error:
        control.sendall(wire.pack_error(error))
        return None, limits
    return text, limits


@dataclass(frozen=True, slots=True)
class _Fork:
    """A process for questions."""

    pid: int
    number: int  # of the order that it was made for
    life: socket.socket  # ends when it ends
    channel: socket.socket  # our copy of its end of the socket that the node asks on, for the obituary


class _Nursery:
    """Makes forks when the node orders them, and tells how they ended."""

    def __init__(self, control: socket.socket, text: ModelText, limits: Limits) -> None:
        self._control = control
        self._text = text
        self._limits = limits
        self._selector = selectors.DefaultSelector()
        self._forks: list[_Fork] = []
        self._orders = bytearray()

    def run(self) -> None:
        """Serve until the node closes the socket."""
        gc.collect()
        gc.freeze()  # collections in a fork need not touch, and so copy, what is there
        give_back()
        limit_memory(self._limits.bytes)  # of the forks: we need no more
        self._selector.register(self._control, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if isinstance(key.data, _Fork):
                    self._bury(key.data)
                    continue
                data = self._control.recv(16 * wire.ORDER.size)
                if not data:
                    return  # the kernel ends the forks with us; where it doesn't, they end with their question
                self._orders += data
                while len(self._orders) >= wire.ORDER.size:
                    what, number = wire.ORDER.unpack_from(self._orders)
                    del self._orders[: wire.ORDER.size]
                    if what == wire.FORK:
                        self._fork(number)
                    else:
                        self._stop(number)

    def _stop(self, number: int) -> None:
        for fork in self._forks:
            if fork.number == number:
                os.kill(fork.pid, signal.SIGKILL)

    def _fork(self, number: int) -> None:
        life, beat = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        nodes, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):  # nothing of it may reach the code of the parent
                _die_with(parent)
                gc.disable()
                for sock in (life, nodes, self._control):
                    sock.close()
                self._selector.close()
                for other in self._forks:
                    other.life.close()
                    other.channel.close()
                _serve(channel, self._text, self._limits)
            os._exit(0)
        with beat, nodes:
            socket.send_fds(self._control, [wire.ORDER.pack(wire.FORK, number)], [nodes.fileno()])
        fork = _Fork(pid, number, life, channel)
        self._forks.append(fork)
        self._selector.register(life, selectors.EVENT_READ, fork)

    def _bury(self, fork: _Fork) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(fork.pid, signal.SIGKILL)  # it has closed its socket, and may do nothing else
        _, status = os.waitpid(fork.pid, 0)
        self._forks.remove(fork)
        self._selector.unregister(fork.life)
        fork.life.close()
        fork.channel.setblocking(False)  # nobody waits for a node that doesn't read
        with contextlib.suppress(OSError):  # it has its answer
            fork.channel.sendall(wire.pack_died(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0))
        fork.channel.close()


def _serve(channel: socket.socket, text: ModelText, limits: Limits) -> None:
    """Give up what is not needed, and answer until the node has no more questions. In the fork.

    In a thread, because that gets memory of its own: among the pieces that reading a vocabulary has left in the
    first thread's, the same work takes twice as long (glibc).
    """
    limit_computing(limits.walk_cpu_s if text.for_grammars else limits.cpu_s + limits.reused_cpu_s)
    for_good()
    held = confine(memory_bytes=limits.bytes)
    thread = threading.Thread(target=_answer, args=(channel, text, limits, held.parts))
    thread.start()
    thread.join()


def _answer(channel: socket.socket, text: ModelText, limits: Limits, confined: tuple[str, ...]) -> None:
    """Answer questions, one after the other."""
    text.warm_up()  # copies the pages that a question writes to before there is one
    before = resource.getrusage(resource.RUSAGE_SELF)
    walk: Walk | None = None
    while (frame := _next_question(channel)) is not None:
        question = wire.read_question(frame)
        try:
            if question.grammar:
                walk = text.guide(question.grammar, question.text)
                answer = wire.pack_mask(walk.mask())
            elif question.taken is not None and walk is not None:
                walk.take(question.taken)
                answer = wire.pack_mask(walk.mask())
            elif question.shown:
                shown = text.render(question.turns, question.tools)
                answer = wire.pack_rendered(shown, more=_has_left(limits, before))
            else:
                turns, tools = question.turns, question.tools
                ids = text.chat(turns, tools) if turns else text.encode(question.text)
                answer = wire.pack_tokens(ids, more=_has_left(limits, before), confined=confined)
        except (Declined, ModelError) as error:
            answer = wire.pack_error(error)
        except MemoryError:
            reason = f"the text wants more than {limits.bytes >> 20} MiB of memory; shorten it"
            answer = wire.pack_error(Declined("bad-request", reason))
        with contextlib.suppress(OSError):  # the node has gone on
            channel.sendall(answer)


def _next_question(channel: socket.socket) -> Frame | None:
    """None when the node has no more."""
    with contextlib.suppress(EOFError, ConnectionError):
        return _receive(channel, wire.MAX_QUESTION)
    return None


def _has_left(limits: Limits, before: resource.struct_rusage) -> bool:
    """Whether the next question would have as much of everything as a fresh fork has, nearly."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    computed = now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime
    grown = (now.ru_maxrss - before.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    return computed < limits.reused_cpu_s and grown < limits.reused_bytes


def _receive(sock: socket.socket, most: int) -> Frame:
    """One frame. Raises EOFError, and ConnectionError when the other side has gone."""
    prefix = _exactly(sock, PREFIX_BYTES)
    header, body = int.from_bytes(prefix[:4], "big"), int.from_bytes(prefix[4:], "big")
    if header + body > most:
        raise EOFError
    return Frame(_exactly(sock, header), _exactly(sock, body))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data, filled = bytearray(size), 0
    while filled < size:
        count = sock.recv_into(memoryview(data)[filled:])
        if not count:
            raise EOFError
        filled += count
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
