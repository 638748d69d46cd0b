"""The engine process: `python -m meshnode.engine.child FD PARENT` serves one span over a socket pair.

It has no event loop, no threads of its own but ONNX Runtime's, and never imports trio, libp2p or torch. When it has
opened its files it gives up all but computing (`enclosed.py`). It ends when the node closes the socket, when the node
dies (whatever the way), or with a sentence on stderr when the node breaks the protocol.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from time import perf_counter_ns
from typing import Final

import numpy as np

from meshnode.core.errors import Declined, FatalError
from meshnode.core.memory import give_back
from meshnode.engine.enclosed import open_enclosed
from meshnode.engine.link import Link
from meshnode.engine.sessions import Sessions
from protocols.enginewire.machine import EngineSide
from protocols.enginewire.messages import (
    ANSWERS,
    MAX_REASON,
    REQUESTS,
    Adapt,
    AdapterLayer,
    Answer,
    Close,
    Done,
    Drop,
    Failed,
    Load,
    Loaded,
    Open,
    Opened,
    Refused,
    Step,
    Stepped,
)
from protocols.errors import RemoteProtocolError
from protocols.frame import Frame

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_TRIM_ROWS: Final = 64  # rows of a step that take long enough (30 ms and more) for a trim (1 ms) not to matter
_EXIT_PROTOCOL: Final = 70
_EXIT_MODEL: Final = 71
_NO_MEMORY: Final = (
    "The layers need more memory than their size allows for, so this graph is not run. If the device is short of "
    "memory, close other programs or lower serve.memory; else serve another model."
)


def main(arguments: list[str]) -> int:
    """Serve until the node closes the socket. The exit code is 0 then, 70 or 71 after a sentence on stderr."""
    descriptor, parent = int(arguments[0]), int(arguments[1])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the node decides
    with socket.socket(fileno=descriptor) as sock:
        link = Link(sock)
        try:
            return _serve(link)
        except RemoteProtocolError as error:
            return _end(f"engine: the node broke the protocol: {error}", _EXIT_PROTOCOL)
        except FatalError as error:  # in a step: a graph that opened, and can't be computed
            return _end(f"engine: {error}", _EXIT_MODEL)
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the node is gone: nobody is left to be told


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies; end of file on the socket does it elsewhere."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(0)


def _end(sentence: str, code: int) -> int:
    sys.stderr.write(sentence + "\n")
    sys.stderr.flush()
    return code


def _serve(link: Link) -> int:
    machine = EngineSide()
    sessions: Sessions | None = None
    while (frame := link.receive()) is not None:
        request = REQUESTS.decode(frame.header)
        machine.take(request)
        body: bytes | memoryview = b""
        answer: Answer
        match request:
            case Load():
                try:
                    sessions, answer = _load(request)
                except FatalError as error:
                    link.send(ANSWERS.encode(Failed(number=request.number, reason=str(error)[:MAX_REASON])))
                    return _end(f"engine: {error}", _EXIT_MODEL)
                except MemoryError:
                    link.send(ANSWERS.encode(Failed(number=request.number, reason=_NO_MEMORY)))
                    return _end(f"engine: {_NO_MEMORY}", _EXIT_MODEL)
            case _ if sessions is None:
                raise RemoteProtocolError(f"a {type(request).__name__} came before the Load")
            case Open():
                answer = _open(sessions, request, frame)
            case Step():
                answer, body = _step(sessions, request, frame)
            case Close():
                sessions.close(request.session, keep=request.keep)
                answer = _done(sessions, request.number)
            case Adapt() | AdapterLayer():
                answer = _adapt(sessions, request, frame)
            case Drop():
                sessions.adapters.drop(request.adapter)
                answer = _done(sessions, request.number)
        link.send(ANSWERS.encode(answer), body)
        if isinstance(request, Load):
            gc.freeze()  # what is there now stays: collections need not look at it in the middle of a step
        if isinstance(request, Load | Close | Adapt | Drop) or (
            isinstance(request, Step) and request.rows >= _TRIM_ROWS
        ):
            give_back()
    return 0


def _load(load: Load) -> tuple[Sessions, Loaded]:
    begin = perf_counter_ns()
    stage, held = open_enclosed(load)
    sessions = Sessions(stage, load)
    load_ms = (perf_counter_ns() - begin) // 1_000_000
    decode_us, prefill_us = sessions.measure()
    return sessions, Loaded(
        number=load.number,
        load_ms=load_ms,
        weight_bytes=stage.weight_bytes,
        decode_us=decode_us,
        prefill_us=prefill_us,
        confined=held.parts,
    )


def _open(sessions: Sessions, request: Open, frame: Frame) -> Answer:
    if len(frame.body) % 4:
        raise RemoteProtocolError(f"an Open carries {len(frame.body)} bytes of prompt, which is no array of int32")
    if request.drawn > len(frame.body) // 4:
        raise RemoteProtocolError(f"an Open has {len(frame.body) // 4} tokens, {request.drawn} of them of its answer")
    try:
        rows = sessions.open(
            request.session,
            first=request.first,
            last=request.last,
            capacity=request.capacity,
            sampling=request.sampling,
            prompt=np.frombuffer(frame.body, "<i4"),
            adapter=request.adapter,
            pooled=request.pooled,
            drawn=request.drawn,
            prefixes=request.prefixes,
        )
    except Declined as no:
        return _refused(request.number, no)
    return Opened(number=request.number, rows=rows, kept_bytes=sessions.kept.nbytes)


def _adapt(sessions: Sessions, request: Adapt | AdapterLayer, frame: Frame) -> Answer:
    try:
        if isinstance(request, Adapt):
            sessions.adapters.announce(request)
        else:
            sessions.adapters.fill(request.adapter, request.layer, frame.body)
    except Declined as no:
        return _refused(request.number, no)
    return _done(sessions, request.number)


def _step(sessions: Sessions, request: Step, frame: Frame) -> tuple[Answer, bytes | memoryview]:
    begin = perf_counter_ns()
    if request.mask > len(frame.body):
        raise RemoteProtocolError(f"a Step has {len(frame.body)} bytes, {request.mask} of them for its mask")
    end = len(frame.body) - request.mask
    try:
        out = sessions.step(
            request.session,
            position=request.position,
            rows=request.rows,
            body=frame.body[:end] if request.mask else frame.body,
            sample_after=request.sample,
            prefill=request.prefill,
            mask=frame.body[end:],
        )
    except Declined as no:
        return _refused(request.number, no), b""
    compute_us = (perf_counter_ns() - begin) // 1000
    answer = Stepped(number=request.number, token=out.token, compute_us=compute_us, chances=out.chances)
    return answer, out.hidden.data.cast("B") if out.hidden.size else b""


def _done(sessions: Sessions, number: int) -> Done:
    return Done(number=number, kept_bytes=sessions.kept.nbytes)


def _refused(number: int, no: Declined) -> Refused:
    return Refused(number=number, code=no.code, reason=str(no)[:MAX_REASON], retry_ms=no.retry_ms)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
