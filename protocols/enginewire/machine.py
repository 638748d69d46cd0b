"""Both ends of the engine wire as state machines without I/O.

Rule 1: every state and every transition is in NODE or ENGINE, nowhere else.
Rule 2: no clock, no randomness, no await. Deadlines are kept by who does the I/O.

The engine answers every request once and in order. A node may stop waiting for an answer (its caller was
cancelled); the answer still comes and is dropped here by its number.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Final

from protocols.enginewire.messages import (
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
    Request,
    Step,
    Stepped,
)
from protocols.errors import LocalProtocolError, RemoteProtocolError


class State(Enum):
    NEW = "new"  # nothing was asked
    LOADING = "loading"  # a Load is on its way
    READY = "ready"  # the span is open
    ENDED = "ended"  # Failed was said: nothing follows


NODE: Final[Mapping[tuple[State, type], State]] = {
    (State.NEW, Load): State.LOADING,
    (State.LOADING, Loaded): State.READY,
    (State.LOADING, Failed): State.ENDED,
    (State.READY, Open): State.READY,
    (State.READY, Step): State.READY,
    (State.READY, Close): State.READY,
    (State.READY, Adapt): State.READY,
    (State.READY, AdapterLayer): State.READY,
    (State.READY, Drop): State.READY,
    (State.READY, Done): State.READY,
    (State.READY, Opened): State.READY,
    (State.READY, Stepped): State.READY,
    (State.READY, Refused): State.READY,
    (State.READY, Failed): State.ENDED,
}
ENGINE: Final[Mapping[tuple[State, type], State]] = {
    (State.NEW, Load): State.READY,
    (State.READY, Open): State.READY,
    (State.READY, Step): State.READY,
    (State.READY, Close): State.READY,
    (State.READY, Adapt): State.READY,
    (State.READY, AdapterLayer): State.READY,
    (State.READY, Drop): State.READY,
}
# Which answers a request can get; Failed can come to any of them.
ANSWERED_BY: Final[Mapping[type, tuple[type, ...]]] = {
    Load: (Loaded, Failed),
    Open: (Opened, Refused, Failed),
    Step: (Stepped, Refused, Failed),
    Close: (Done, Failed),
    Adapt: (Done, Refused, Failed),
    AdapterLayer: (Done, Refused, Failed),
    Drop: (Done, Failed),
}


class NodeSide:
    """Numbers requests and matches answers."""

    def __init__(self) -> None:
        self.state = State.NEW
        self._next = 1
        self._waiting: deque[Request] = deque()

    @property
    def waiting(self) -> int:
        """How many requests have no answer yet."""
        return len(self._waiting)

    def ask(self, request: Request) -> Request:
        """The request with its number, to be sent.

        Raises:
          LocalProtocolError: not allowed in this state. Nothing has changed.
        """
        after = NODE.get((self.state, type(request)))
        if after is None:
            raise LocalProtocolError(f"a {type(request).__name__} to an engine that is {self.state.value}")
        numbered = dataclasses.replace(request, number=self._next)
        self._next += 1
        self._waiting.append(numbered)
        self.state = after
        return numbered

    def answered(self, answer: Answer) -> Request:
        """The request that this answer belongs to.

        Raises:
          RemoteProtocolError: nothing was asked, another number is due, or the answer is of the wrong kind.
        """
        if not self._waiting:
            raise RemoteProtocolError(f"the engine sent a {type(answer).__name__} that nobody asked for")
        request = self._waiting[0]
        if answer.number != request.number:
            raise RemoteProtocolError(f"the engine answered request {answer.number}, {request.number} is due")
        after = NODE.get((self.state, type(answer)))
        if after is None or type(answer) not in ANSWERED_BY[type(request)]:
            raise RemoteProtocolError(f"the engine answered a {type(request).__name__} with {type(answer).__name__}")
        self._waiting.popleft()
        self.state = after
        return request


class EngineSide:
    """Checks that the requests come in order: Load first and once, numbers counting up."""

    def __init__(self) -> None:
        self.state = State.NEW
        self._last = 0

    def take(self, request: Request) -> None:
        """Accept a request.

        Raises:
          RemoteProtocolError: not allowed in this state, or a number that does not follow. Nothing has changed.
        """
        after = ENGINE.get((self.state, type(request)))
        if after is None:
            raise RemoteProtocolError(
                f"the node sent a {type(request).__name__} to an engine that is {self.state.value}"
            )
        if request.number != self._last + 1:
            raise RemoteProtocolError(f"the node sent request {request.number}, {self._last + 1} is due")
        self._last = request.number
        self.state = after
