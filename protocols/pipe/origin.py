"""The asking end of /meshnode/pipe/1 as a state machine without I/O. See SPEC.md.

Rule 1: every transition is in ORIGIN_TRANSITIONS, and the next state is read from there.
Rule 2: no clock, no randomness, no await. Time comes in as `now` (seconds), a wish to be woken goes out as
`deadline`, messages go out as effects.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.pipe.messages import (
    LOST,
    Chance,
    Close,
    Grammar,
    Hop,
    HopTime,
    Message,
    Open,
    Opened,
    Pooled,
    Prefix,
    Refused,
    Sampling,
    Step,
    Token,
    Trace,
)
from protocols.pipe.timeouts import OPEN_S, PREFILL_ROW_S, STEP_S
from protocols.words import layers

TIMEOUT: Final = "timeout"
REPLAY_ROWS: Final = 32  # of one step: while one stage runs them, the one before runs the next ones
LENGTH_TOLERANCE: Final = 1e-3  # float32 numbers of a vector of length 1 square up to it within 1e-6


@dataclass(frozen=True, slots=True)
class Begin:
    """Origin: ask every stage for a session."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message of this session came from a peer. `network_us`: how long it was under way."""

    peer: str
    message: Opened | Refused | Token | Pooled
    network_us: int = 0
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class PeerGone:
    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The user has enough: cancelled, or a stop string was found."""

    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline has passed."""


OriginEvent = Begin | Received | PeerGone | Stop | Expired


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a peer (which may be ourselves). `body` holds token ids for the first stage."""

    peer: str
    message: Message
    body: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Emit:
    """A token of the answer."""

    token: int
    position: int
    times: tuple[HopTime, ...]
    return_us: int
    chances: tuple[Chance, ...] = ()  # the token's own, then the best ones


@dataclass(frozen=True, slots=True)
class EmitPooled:
    """The prompt as one vector of length 1."""

    vector: tuple[float, ...]
    times: tuple[HopTime, ...]
    return_us: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete: "eos", "length", "pooled", or the reason of `Stop`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The session is lost. `code` as in `Refused`, or `LOST`, `TIMEOUT`; `peer`: who is to be avoided."""

    code: str
    reason: str
    peer: str | None
    retry_ms: int = 0


OriginEffect = Send | Emit | EmitPooled | Finished | Failed


class OriginState(Enum):
    NEW = "new"
    OPENING = "opening"
    RUNNING = "running"
    CLOSED = "closed"


class OriginTurn(Enum):
    """What an event means to the origin."""

    BEGIN = "Begin"
    OPENED = "Opened"  # others are missing
    ALL_OPENED = "last Opened"
    TOKEN = "Token"
    LAST_TOKEN = "last Token"  # an end token, or there is room for no further one
    POOLED = "Pooled"
    REFUSED = "Refused"
    PEER_GONE = "PeerGone"  # a peer of the route
    STOP = "Stop"
    EXPIRED = "Expired"


ORIGIN_TRANSITIONS: Final[Mapping[tuple[OriginState, OriginTurn], OriginState]] = {
    (OriginState.NEW, OriginTurn.BEGIN): OriginState.OPENING,
    (OriginState.NEW, OriginTurn.STOP): OriginState.CLOSED,
    (OriginState.OPENING, OriginTurn.OPENED): OriginState.OPENING,
    (OriginState.OPENING, OriginTurn.ALL_OPENED): OriginState.RUNNING,
    (OriginState.OPENING, OriginTurn.REFUSED): OriginState.CLOSED,
    (OriginState.OPENING, OriginTurn.PEER_GONE): OriginState.CLOSED,
    (OriginState.OPENING, OriginTurn.STOP): OriginState.CLOSED,
    (OriginState.OPENING, OriginTurn.EXPIRED): OriginState.CLOSED,
    (OriginState.RUNNING, OriginTurn.TOKEN): OriginState.RUNNING,
    (OriginState.RUNNING, OriginTurn.LAST_TOKEN): OriginState.CLOSED,
    (OriginState.RUNNING, OriginTurn.POOLED): OriginState.CLOSED,
    (OriginState.RUNNING, OriginTurn.REFUSED): OriginState.CLOSED,
    (OriginState.RUNNING, OriginTurn.PEER_GONE): OriginState.CLOSED,
    (OriginState.RUNNING, OriginTurn.STOP): OriginState.CLOSED,
    (OriginState.RUNNING, OriginTurn.EXPIRED): OriginState.CLOSED,
}
# No turn, and ignored: messages of another attempt, the loss of a peer outside the route, anything once closed.


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be generated, by which model."""

    manifest: str
    variant: str
    prompt: tuple[int, ...]
    chunks: tuple[int, ...]  # rows of the prompt that are sent together
    max_tokens: int  # 0 for a prompt that is pooled
    eos: frozenset[int]
    sampling: Sampling
    grammar: Grammar | None = None  # what the answer has to be
    adapter: str = ""  # CID of what the stages add to the model; "": nothing
    prefixes: tuple[Prefix, ...] = ()  # beginnings of the prompt that the stages may have kept, and may keep
    trace: Trace | None = None  # that the stages' spans belong to
    pooled: int = 0  # numbers of the vector that the prompt is to become, instead of an answer; 0: an answer


class Origin:
    """One attempt at a generation, seen from the node that asked.

    Prompt chunks are all sent at once (the stages work on them in a pipeline); afterwards one step is under
    way at a time. Chunk boundaries are given, because they are a function of the prompt alone.

    An attempt after the first one knows what was drawn before: its stages run the same rows once more, in the
    shapes that they had, and go on with the token after them.
    """

    def __init__(
        self,
        *,
        session: bytes,
        attempt: int,
        us: str,
        route: tuple[Hop, ...],
        task: Task,
        drawn: tuple[int, ...] = (),
        open_s: float = OPEN_S,
    ) -> None:
        """Args:
        drawn: tokens of the answer that earlier attempts have given.
        open_s: how long all stages may take to answer Open; less where there is another way.
        """
        prompt = task.prompt
        if not route or not prompt or sum(task.chunks) != len(prompt) or (task.max_tokens < 1) != (task.pooled > 0):
            raise LocalProtocolError(
                "a session needs a route, a prompt that its chunks add up to, and max_tokens unless it is pooled"
            )
        if drawn and (len(drawn) >= task.max_tokens or drawn[-1] in task.eos):
            raise LocalProtocolError(f"an answer of {len(drawn)} tokens is complete and can't be gone on with")
        self.state = OriginState.NEW
        self.deadline: float | None = None
        self.peers: Final = tuple(dict.fromkeys(hop.peer for hop in route))  # distinct, in their order
        self.attempt: Final = attempt
        self._session, self._us = session, us
        self._route, self._task = route, task
        self._end = len(prompt) + task.max_tokens  # position after the last token that may be sampled
        self._opened: set[int] = set()
        self._kept: list[int] = []  # rows that each stage which has opened has already
        self._drawn = drawn
        self._next = len(prompt) + len(drawn)  # position of the token that comes next
        self._open_s = open_s
        self._patience = 0.0  # seconds until the deadline, when it was set

    @property
    def began(self) -> bool:
        """Whether every stage has opened, at some time."""
        return len(self._opened) == len(self._route)

    @property
    def cached(self) -> int:
        """Tokens of the prompt that need not be computed, once every stage has opened: what all have kept."""
        return min(*self._kept, len(self._task.prompt) - 1) if self.began else 0

    def handle(self, event: OriginEvent, now: float) -> tuple[OriginEffect, ...]:
        """Take one event at time `now` (seconds, monotonic) and return what to do, in order.

        Stale messages (another attempt, after the end) are ignored: nobody's fault.

        Raises:
          RemoteProtocolError: a peer sent what this state does not allow; nothing has changed.
          LocalProtocolError: we did.
        """
        if self.state is OriginState.CLOSED or self._is_stale(event):
            return ()
        turn = self._turn_of(event)
        after = ORIGIN_TRANSITIONS.get((self.state, turn))
        if after is None:
            if isinstance(event, Received):
                kind = type(event.message).__name__
                raise RemoteProtocolError(f"{event.peer} sent {kind}; the session is {self.state.value}")
            raise LocalProtocolError(f"{turn.value} in state {self.state.value}")
        effects = self._act(turn, event, now)
        if after is OriginState.CLOSED:
            self.deadline = None
            closes = () if self.state is OriginState.NEW else self._closes(keep=isinstance(effects[-1], Finished))
            effects = (*effects[:-1], *closes, effects[-1])
        self.state = after
        return effects

    def _is_stale(self, event: OriginEvent) -> bool:
        match event:
            case Received():
                return event.message.attempt != self.attempt
            case PeerGone(peer):
                return peer not in self.peers
        return False

    def _turn_of(self, event: OriginEvent) -> OriginTurn:
        if not isinstance(event, Received):
            return _TURNS[type(event)]
        match event.message:
            case Token(token=token):
                last = token in self._task.eos or self._next + 1 == self._end
                return OriginTurn.LAST_TOKEN if last else OriginTurn.TOKEN
            case Opened(index=index):
                all_opened = len(self._opened | {index}) == len(self._route)
                return OriginTurn.ALL_OPENED if all_opened else OriginTurn.OPENED
            case Pooled():
                return OriginTurn.POOLED
            case Refused():
                return OriginTurn.REFUSED

    def _act(self, turn: OriginTurn, event: OriginEvent, now: float) -> tuple[OriginEffect, ...]:
        """What to do; of a session that ends by it, the end comes last. Raises RemoteProtocolError first of all."""
        match event:
            case Received():
                return self._received(turn, event, now)
            case Begin():
                return self._begin(now)
            case PeerGone(peer, reason):
                hop = next(hop for hop in self._route if hop.peer == peer)
                return (Failed(LOST, f"{_layers(hop)} went away: {reason}; ask again", peer),)
            case Stop(reason):
                return (Finished(reason),)
            case Expired():
                return (self._expired(),)

    def _received(self, turn: OriginTurn, event: Received, now: float) -> tuple[OriginEffect, ...]:
        peer, message = event.peer, event.message
        if isinstance(message, Token):
            return self._token(turn, peer, message, event.network_us, now)
        if isinstance(message, Pooled):
            return self._pooled(peer, message, event)
        if message.index >= len(self._route) or self._route[message.index].peer != peer:
            raise RemoteProtocolError(f"{peer} answered for stage {message.index}, which is not its own")
        if isinstance(message, Refused):
            return (self._refused(message),)
        if message.kept not in (0, *(prefix.tokens for prefix in self._task.prefixes)):
            raise RemoteProtocolError(f"{peer} has kept {message.kept} rows, which is none of the prefixes")
        self._opened.add(message.index)
        self._kept.append(message.kept)
        return self._prefill(now) if turn is OriginTurn.ALL_OPENED else ()

    def _begin(self, now: float) -> tuple[OriginEffect, ...]:
        self._wait(now, self._open_s)
        last = len(self._route) - 1
        return tuple(
            Send(
                hop.peer,
                Open(
                    session=self._session,
                    attempt=self.attempt,
                    origin=self._us,
                    manifest=self._task.manifest,
                    variant=self._task.variant,
                    route=self._route,
                    index=index,
                    capacity=self._end,
                    sampling=self._task.sampling if index == last and not self._task.pooled else None,
                    adapter=self._task.adapter,
                    grammar=self._task.grammar if index == last else None,
                    pooled=index == last and self._task.pooled > 0,
                    drawn=len(self._drawn) if index == last else 0,
                    prefixes=self._task.prefixes,
                    trace=self._task.trace,
                ),
                self._task.prompt + self._drawn if index == last else (),
            )
            for index, hop in enumerate(self._route)
        )

    def _refused(self, message: Refused) -> Failed:
        """A stage that could not reach the next one is not the one to avoid."""
        hop = self._route[message.index]
        if message.code != LOST or message.index + 1 == len(self._route):
            return Failed(message.code, message.reason, hop.peer, message.retry_ms)
        gone = self._route[message.index + 1]
        text = f"{_layers(gone)} could not be reached from the stage before it: {message.reason}"
        return Failed(LOST, text, gone.peer, message.retry_ms)

    def _wait(self, now: float, seconds: float) -> None:
        self.deadline = now + seconds
        self._patience = seconds

    def _prefill(self, now: float) -> tuple[OriginEffect, ...]:
        """The prompt, and what was drawn already: the last row brings the next token."""
        self._wait(now, STEP_S + PREFILL_ROW_S * self._next)
        steps: list[OriginEffect] = []
        position = 0
        for rows in self._task.chunks:
            begin, position = max(position, self.cached), position + rows
            if begin < position:
                body = self._task.prompt[begin:position]
                steps.append(self._step(begin, body, sample=position == self._next, prefill=True))
        for begin in range(0, len(self._drawn), REPLAY_ROWS):
            body = self._drawn[begin : begin + REPLAY_ROWS]
            sample = begin + len(body) == len(self._drawn)
            steps.append(self._step(position + begin, body, sample=sample, prefill=False))
        return tuple(steps)

    def _step(self, position: int, body: tuple[int, ...], *, sample: bool, prefill: bool) -> Send:
        step = Step(
            session=self._session,
            attempt=self.attempt,
            position=position,
            rows=len(body),
            sample=sample,
            prefill=prefill,
            sent_us=0,
        )
        return Send(self._route[0].peer, step, body)

    def _token(
        self, turn: OriginTurn, peer: str, message: Token, network_us: int, now: float
    ) -> tuple[OriginEffect, ...]:
        self._check_last(peer, message)
        if self._task.pooled or message.position != self._next:
            expected = "a vector" if self._task.pooled else str(self._next)
            raise RemoteProtocolError(f"{peer} sent the token at {message.position}, expected is {expected}")
        asked = self._task.sampling.chances
        given = [chance.token for chance in message.chances]
        if len(given) > asked or given[:1] != [message.token][:asked]:
            raise RemoteProtocolError(f"{peer} told the chances of {given[:4]} beside the token {message.token}")
        self._next += 1
        emit = Emit(message.token, message.position, message.times, network_us, message.chances)
        if turn is OriginTurn.LAST_TOKEN:
            return (emit, Finished("eos" if message.token in self._task.eos else "length"))
        self._wait(now, STEP_S)
        # The stages work on the next token while the reader of this one takes his time.
        return (self._step(message.position, (message.token,), sample=True, prefill=False), emit)

    def _pooled(self, peer: str, message: Pooled, event: Received) -> tuple[OriginEffect, ...]:
        self._check_last(peer, message)
        size = 4 * self._task.pooled
        if not size or len(event.body) != size:
            raise RemoteProtocolError(f"{peer} sent a vector of {len(event.body)} bytes; {size} are due")
        vector = struct.unpack(f"<{self._task.pooled}f", event.body)
        length = math.hypot(*vector)
        if not abs(length - 1) < LENGTH_TOLERANCE:
            raise RemoteProtocolError(f"{peer} sent a vector of length {length:g}, which is not 1")
        return EmitPooled(vector, message.times, event.network_us), Finished("pooled")

    def _check_last(self, peer: str, message: Token | Pooled) -> None:
        """Raises RemoteProtocolError unless it can be the last stage's."""
        if peer != self._route[-1].peer:
            kind = "a token" if isinstance(message, Token) else "a vector"
            raise RemoteProtocolError(f"{peer} sent {kind}, but the last stage is {self._route[-1].peer}")
        if len(message.times) != len(self._route):
            raise RemoteProtocolError(f"{peer} sent {len(message.times)} hop times for {len(self._route)} stages")

    def _expired(self) -> Failed:
        seconds = f"{self._patience:.0f} s"
        if self.state is OriginState.OPENING:
            missing = [hop for i, hop in enumerate(self._route) if i not in self._opened]
            who = " and ".join(_layers(hop) for hop in missing)
            return Failed(TIMEOUT, f"{who} did not open the session within {seconds}", missing[0].peer)
        text = f"no token came within {seconds} from {' and '.join(_layers(hop) for hop in self._route)}".rstrip(",")
        return Failed(TIMEOUT, text, None)

    def _closes(self, *, keep: bool) -> tuple[Send, ...]:
        """`keep`: nothing went wrong, so the rows of the prompt are what they should be."""
        keep = keep and bool(self._task.prefixes)
        return tuple(Send(peer, Close(session=self._session, attempt=self.attempt, keep=keep)) for peer in self.peers)


_TURNS: Final[Mapping[type[OriginEvent], OriginTurn]] = {
    Begin: OriginTurn.BEGIN,
    PeerGone: OriginTurn.PEER_GONE,
    Stop: OriginTurn.STOP,
    Expired: OriginTurn.EXPIRED,
}


def _layers(hop: Hop) -> str:
    """A stage for people; the last layer is named, not the one after it."""
    return f"the node {hop.peer}, which runs {layers(hop.first, hop.last)},"
