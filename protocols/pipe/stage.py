"""A stage's end of /meshnode/pipe/1 as a state machine without I/O. See SPEC.md.

Rule 1: every transition is in STAGE_TRANSITIONS, and the next state is read from there.
Rule 2: no clock, no randomness, no await. Messages go out as results, how long to wait for a step as `patience`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocols.errors import RemoteProtocolError
from protocols.pipe.messages import Chance, Close, HopTime, Message, Open, Opened, Pooled, Refused, Step, Token
from protocols.pipe.timeouts import FIRST_ROWS, FIRST_STEP_S, IDLE_S, PREFILL_ROW_S


@dataclass(frozen=True, slots=True)
class Ran:
    """What the engine made of a step: hidden states are sent as the body, a token as a message."""

    step: Step
    token: int | None
    time: HopTime
    chances: tuple[Chance, ...] = ()  # of the token, if they were asked for


class StageState(Enum):
    OPEN = "open"
    CLOSED = "closed"


STAGE_TRANSITIONS: Final[Mapping[tuple[StageState, type], StageState]] = {
    (StageState.OPEN, Step): StageState.OPEN,
    (StageState.OPEN, Ran): StageState.OPEN,
    (StageState.OPEN, Close): StageState.CLOSED,
    (StageState.OPEN, Refused): StageState.CLOSED,  # said by us
}  # what else happens is ignored


class StageSession:
    """One session, seen from a stage of its route: who may feed it, in which order, and where to send."""

    def __init__(self, opening: Open, us: str) -> None:
        """Raises RemoteProtocolError for a route that is no chain, or does not name us at its index."""
        route = opening.route
        if not 0 <= opening.index < len(route) or route[opening.index].peer != us:
            raise RemoteProtocolError(f"the route of {opening.origin} does not name us at stage {opening.index}")
        if any(hop.first >= hop.last for hop in route) or route[0].first != 0:
            raise RemoteProtocolError(f"the route of {opening.origin} has an empty span or does not start at layer 0")
        if any(a.last != b.first for a, b in itertools.pairwise(route)):
            raise RemoteProtocolError(f"the route of {opening.origin} has a gap or an overlap between its spans")
        if len({hop.peer for hop in route}) != len(route):
            raise RemoteProtocolError(f"the route of {opening.origin} names a node twice")
        self.opening = opening
        self.state = StageState.OPEN
        self.hop = route[opening.index]
        self.is_last = opening.index == len(route) - 1
        if (opening.sampling is not None) + opening.pooled != self.is_last:
            raise RemoteProtocolError(
                f"{opening.origin} has to tell the last stage, and no other, either how to sample or to pool"
            )
        if opening.grammar is not None and opening.sampling is None:
            raise RemoteProtocolError(f"{opening.origin} gave a grammar to a stage that draws no tokens")
        if opening.drawn and opening.sampling is None:
            raise RemoteProtocolError(
                f"{opening.origin} gave an answer to go on with to a stage that draws no tokens"
            )
        if opening.trace is not None and not (any(opening.trace.id) and any(opening.trace.span)):
            raise RemoteProtocolError(f"{opening.origin} named a trace of zeros, which is none")
        ends = [0, *(prefix.tokens for prefix in opening.prefixes)]
        if any(a >= b for a, b in itertools.pairwise(ends)) or ends[-1] > opening.capacity:
            raise RemoteProtocolError(
                f"{opening.origin} named beginnings of {ends[1:5]} tokens; each has to be longer than the one "
                f"before, and the session holds {opening.capacity}"
            )
        self._upstream = opening.origin if opening.index == 0 else route[opening.index - 1].peer
        self.downstream = opening.origin if self.is_last else route[opening.index + 1].peer
        self._next = 0  # position after the last row that was taken
        self._fed = False  # whether a step came
        self._catching_up = True  # whether what is on its way may be many rows: of the prompt, or of a replay
        self._sampled = False  # whether the last step asked for a token

    @property
    def patience(self) -> float:
        """Seconds without a step after which a session is not kept: its Close must have got lost.

        The origin feeds the first stage as soon as all have opened; others wait for what the stages before make of
        the first rows. While the prompt or a replay is on its way, stages behind us may have many rows to run.
        """
        capacity = self.opening.capacity
        if not self._fed:
            return FIRST_STEP_S + PREFILL_ROW_S * min(capacity, FIRST_ROWS) * self.opening.index
        return IDLE_S + (PREFILL_ROW_S * capacity if self._catching_up else 0.0)

    def opened(self, kept: int) -> Opened:
        """The engine has the session, and so many of its rows are there already: they need not come again."""
        self._next = kept
        opening = self.opening
        return Opened(session=opening.session, attempt=opening.attempt, index=opening.index, kept=kept)

    def take(self, peer: str, step: Step) -> bool:
        """A step came in. Whether the engine is to run it; one of another attempt or a closed session is ignored.

        Raises:
          RemoteProtocolError: from the wrong peer, with a gap, above the capacity, wrong number of times.
        """
        after = STAGE_TRANSITIONS.get((self.state, Step))
        if after is None or step.attempt != self.opening.attempt:
            return False
        if peer != self._upstream:
            raise RemoteProtocolError(f"{peer} sent a step, but {self._upstream} is the stage before us")
        if step.position > self._next:
            raise RemoteProtocolError(f"{peer} sent a step at {step.position}, but only {self._next} rows are here")
        if step.position + step.rows > self.opening.capacity:
            raise RemoteProtocolError(
                f"{peer} sent rows up to {step.position + step.rows}, the session holds {self.opening.capacity}"
            )
        if len(step.times) != self.opening.index:
            raise RemoteProtocolError(f"{peer} sent {len(step.times)} hop times to stage {self.opening.index}")
        self._next = step.position + step.rows
        self._fed = True
        self._catching_up = step.prefill or not self._sampled
        self._sampled = step.sample
        self.state = after
        return True

    def ran(self, result: Ran) -> tuple[str, Message] | None:
        """The engine is done: where to send what (the body comes beside it). None: nothing to send."""
        if not self._go(Ran):
            return None
        step = result.step
        times = (*step.times, result.time)
        if not self.is_last:
            onward = Step(
                session=step.session,
                attempt=step.attempt,
                position=step.position,
                rows=step.rows,
                sample=step.sample,
                prefill=step.prefill,
                sent_us=0,
                times=times,
            )
            return self.downstream, onward
        if self.opening.pooled and step.sample:
            return self.downstream, Pooled(session=step.session, attempt=step.attempt, sent_us=0, times=times)
        if result.token is None:
            return None
        position = step.position + step.rows
        token = Token(
            session=step.session,
            attempt=step.attempt,
            position=position,
            token=result.token,
            sent_us=0,
            times=times,
            chances=result.chances,
        )
        return self.downstream, token

    def may_close(self, peer: str) -> bool:
        """Whether this peer may close the session: only its origin."""
        return peer == self.opening.origin

    def close(self) -> None:
        """The session is over; again is no harm."""
        self._go(Close)

    def _go(self, event: type) -> bool:
        """Take the transition of an event that nothing can be wrong with; False where the table has none."""
        after = STAGE_TRANSITIONS.get((self.state, event))
        self.state = after or self.state
        return after is not None

    def refusal(self, code: str, reason: str, retry_ms: int = 0) -> tuple[str, Refused]:
        """End the session and tell its origin why."""
        self._go(Refused)
        return self.opening.origin, refusal(self.opening, code, reason, retry_ms)


def refusal(opening: Open, code: str, reason: str, retry_ms: int = 0) -> Refused:
    """The answer no to an Open."""
    return Refused(
        session=opening.session,
        attempt=opening.attempt,
        index=opening.index,
        code=code,
        reason=reason[:500],
        retry_ms=retry_ms,
    )
