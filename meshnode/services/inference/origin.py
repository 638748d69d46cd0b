"""Asking: one generation from prompt tokens to answer tokens through a route of stages."""

from __future__ import annotations

import array
import math
import random
import statistics
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.policy.chunking import chunks
from meshnode.policy.route import NoRoute
from protocols.codec import encode
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import SESSION_BYTES, PeerId, short
from protocols.pipe.machine import (
    LOST,
    TIMEOUT,
    Begin,
    Emit,
    Expired,
    Failed,
    Finished,
    Origin,
    OriginEffect,
    OriginEvent,
    PeerGone,
    Received,
    Stop,
)
from protocols.pipe.machine import Send as SendEffect
from protocols.pipe.messages import Close, Hop, HopTime, Message, Opened, Refused, Sampling, Token

EVENTS: Final = 256  # messages of one session that wait for us: stages answer once per step
GOODBYE_SECONDS: Final = 2.0  # for telling the stages that a session is over
MAX_TOKEN_ID: Final = 1 << 24  # as in a Token
OPEN_ATTEMPTS: Final = 3  # routes that are tried when a stage refuses before the first token
RETRY_CODES: Final = frozenset({"fenced", "busy", "not-ready", "engine-lost", "bad-input", "too-long", LOST})

log = structlog.get_logger()

Send = Callable[[PeerId, Message, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Target:
    """What the network serves: the model that routes are made for."""

    manifest: str
    variant: str
    layers: int
    context: int  # tokens
    eos: frozenset[int]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to answer it."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    chunk_rows: int = 256


@dataclass(slots=True)
class Receipt:
    """What was run, with figures. Times in seconds (monotonic), hop times in microseconds."""

    route: tuple[Hop, ...]
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each token
    hop_times: list[tuple[HopTime, ...]] = field(default_factory=list)  # per token, per stage
    return_us: list[int] = field(default_factory=list)  # per token: last stage -> origin
    reason: str = ""

    @property
    def first_token_ms(self) -> float:
        return (self.arrivals[0] - self.began) * 1000 if self.arrivals else math.nan

    @property
    def decode_tokens_s(self) -> float:
        """Tokens per second after the first one; NaN below two tokens."""
        if len(self.arrivals) < 2:
            return math.nan
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    def hops(self) -> list[dict[str, object]]:
        """Per stage: who, which layers, and the medians over the decode steps, in milliseconds."""
        steps = self.hop_times[1:] or self.hop_times
        out: list[dict[str, object]] = []
        for index, hop in enumerate(self.route):
            times = [step[index] for step in steps]
            out.append(
                {
                    "peer": hop.peer,
                    "first": hop.first,
                    "last": hop.last,
                    "network_ms": _median_ms([t.network_us for t in times]),
                    "queue_ms": _median_ms([t.queue_us for t in times]),
                    "compute_ms": _median_ms([t.compute_us for t in times]),
                }
            )
        return out

    def return_ms(self) -> float:
        """Median time from the last stage back to us."""
        return _median_ms(self.return_us[1:] or self.return_us)


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of the answer, as it comes. `receipt`: of this answer, up to this token; it goes on growing."""

    token: int
    receipt: Receipt


def _median_ms(values: Sequence[int]) -> float:
    return round(statistics.median(values) / 1000, 3) if values else 0.0


class Generation:
    """One running session: its machine, and the events that wait for it."""

    def __init__(self, machine: Origin, receipt: Receipt) -> None:
        self.machine = machine
        self.receipt = receipt
        self.goodbyes: list[SendEffect] = []
        self._events: deque[OriginEvent] = deque()
        self._came = trio.Event()

    @property
    def waiting(self) -> int:
        """Events that the machine has not seen yet."""
        return len(self._events)

    def put(self, event: OriginEvent) -> None:
        self._events.append(event)
        self._came.set()

    async def next(self) -> OriginEvent:
        """The next event, or Expired at the deadline; what has come in time counts, however late it is asked for."""
        if not self._events:
            self._came = trio.Event()
            deadline = self.machine.deadline
            with trio.move_on_at(math.inf if deadline is None else deadline):
                await self._came.wait()
        return self._events.popleft() if self._events else Expired()


class GenerationService:
    """The origin's side of every session this node asks for."""

    name = "generation"

    def __init__(
        self,
        *,
        us: PeerId,
        send: Send,
        target: Callable[[], Target | None],
        route: Callable[[Target, int, frozenset[PeerId]], tuple[Hop, ...] | NoRoute],
        rng: random.Random,
    ) -> None:
        """`route(target, seed, avoid)`: a chain of stages over the newest view."""
        self._us = us
        self._send = send
        self._target = target
        self._route = route
        self._rng = rng
        self._running: dict[bytes, Generation] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    def in_flight(self) -> dict[PeerId, int]:
        """Our own open sessions per peer: load that its advert does not show yet."""
        out: dict[PeerId, int] = {}
        for generation in self._running.values():
            for peer in generation.machine.peers:
                out[PeerId(peer)] = out.get(PeerId(peer), 0) + 1
        return out

    async def receive(self, peer: PeerId, message: Opened | Refused | Token, network_us: int) -> None:
        """Take an answer of a stage. Sessions that are over are ignored."""
        generation = self._running.get(message.session)
        if generation is None:
            return
        if peer not in generation.machine.peers:
            raise RemoteProtocolError(f"{peer} answers for a session that it takes no part in")
        if generation.waiting >= EVENTS:
            raise RemoteProtocolError(f"more than {EVENTS} messages for one session at once")
        generation.put(Received(peer, message, network_us))

    def peer_gone(self, peer: PeerId, reason: str) -> None:
        """Our connection or pipe to a peer broke: sessions that pass through it fail at once."""
        for generation in self._running.values():
            if peer in generation.machine.peers:
                generation.put(PeerGone(peer, reason))

    async def generate(self, request: Request) -> AsyncGenerator[Piece | Receipt, None]:
        """Tokens as they come, at last the receipt.

        Raises:
          Declined: no model, no route, the prompt is too long, or every stage asked said no.
          PeerUnreachable: a stage was lost on the way (which one, and which layers).

        If cancelled or closed: every stage is told that the session is over (2 s at most).
        """
        target = self._target()
        if target is None:
            raise Declined("no-model", "the network serves no model yet; add one with: meshnode model add PATH")
        _check(request)
        room = target.context - len(request.prompt)
        if room < 1:
            raise Declined(
                "too-long",
                f"the prompt has {len(request.prompt)} tokens; the model holds {target.context} with its answer",
            )
        avoid: set[PeerId] = set()
        failure: Declined | PeerUnreachable | None = None
        for attempt in range(OPEN_ATTEMPTS):
            route = self._route(target, self._rng.getrandbits(32), frozenset(avoid))
            if isinstance(route, NoRoute):
                # That there is no other way is no news; why this one failed is.
                raise failure or Declined("no-route", route.reason, retry_ms=route.retry_ms)
            started = False
            try:
                async with (
                    self._session(target, route, request, min(request.max_tokens, room)) as generation,
                    aclosing(self._drive(generation)) as pieces,
                ):
                    async for piece in pieces:
                        started = True
                        yield piece
            except (Declined, PeerUnreachable) as error:
                code = error.code if isinstance(error, Declined) else LOST
                if started or code not in RETRY_CODES or error.peer is None or attempt == OPEN_ATTEMPTS - 1:
                    raise
                log.info("route.retried", peer=short(error.peer), reason=str(error))
                avoid.add(error.peer)
                failure = error
            else:
                yield generation.receipt
                return

    @asynccontextmanager
    async def _session(
        self, target: Target, route: tuple[Hop, ...], request: Request, max_tokens: int
    ) -> AsyncIterator[Generation]:
        """Registers a session and, whatever happens, tells its stages that it is over."""
        key = self._rng.randbytes(SESSION_BYTES)
        machine = Origin(
            session=key,
            attempt=0,
            us=self._us,
            manifest=target.manifest,
            variant=target.variant,
            route=route,
            prompt=request.prompt,
            chunks=chunks(len(request.prompt), request.chunk_rows),
            max_tokens=max_tokens,
            eos=target.eos,
            sampling=request.sampling,
        )
        generation = Generation(machine, Receipt(route, request.prompt, began=trio.current_time()))
        self._running[key] = generation
        try:
            yield generation
        finally:
            del self._running[key]
            stopped = machine.handle(Stop("cancelled"), trio.current_time())
            goodbyes = generation.goodbyes + [effect for effect in stopped if isinstance(effect, SendEffect)]
            # All at once: a stage that takes nothing must not keep the others from hearing of it.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_SECONDS):
                async with trio.open_nursery() as nursery:
                    for goodbye in goodbyes:
                        nursery.start_soon(self._perform, goodbye)

    async def _drive(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        """Feed the machine until the session ends: one event, all its effects, the next event."""
        machine, receipt = generation.machine, generation.receipt
        event: OriginEvent = Begin()
        while True:
            for effect in self._handle(machine, event):
                match effect:
                    case SendEffect(message=Close()):
                        generation.goodbyes.append(effect)
                    case SendEffect():
                        failure = await self._perform(effect)
                        if failure is not None:
                            generation.put(PeerGone(effect.peer, failure))
                    case Emit():
                        receipt.tokens.append(effect.token)
                        receipt.arrivals.append(trio.current_time())
                        receipt.hop_times.append(effect.times)
                        receipt.return_us.append(effect.return_us)
                        yield Piece(effect.token, receipt)
                    case Finished(reason):
                        receipt.reason = reason
                        return
                    case Failed(code, reason, peer, retry_ms):
                        gone = None if peer is None else PeerId(peer)
                        if code in (LOST, TIMEOUT):
                            raise PeerUnreachable(reason, peer=gone)
                        raise Declined(code, reason, retry_ms=retry_ms, peer=gone)
            event = await generation.next()

    def _handle(self, machine: Origin, event: OriginEvent) -> tuple[OriginEffect, ...]:
        """A stage that breaks the rules is lost to this session, like one that went away."""
        try:
            return machine.handle(event, trio.current_time())
        except RemoteProtocolError as error:
            assert isinstance(event, Received)
            log.warning("stage.misbehaved", peer=short(event.peer), reason=str(error))
            gone = PeerGone(event.peer, f"it broke the rules of the pipe: {error}")
            return machine.handle(gone, trio.current_time())

    async def _perform(self, effect: SendEffect) -> str | None:
        """Send one message. Returns why it could not be sent."""
        body = array.array("i", effect.body)
        if sys.byteorder == "big":
            body.byteswap()
        try:
            await self._send(PeerId(effect.peer), effect.message, body.tobytes())
        except (PeerUnreachable, Declined) as error:
            return str(error)
        return None


def _check(request: Request) -> None:
    """Raises Declined `bad-request` with a sentence about the first thing that is wrong."""
    if not request.prompt:
        raise Declined("bad-request", "the prompt is empty")
    if request.max_tokens < 1:
        raise Declined("bad-request", f"max_tokens is {request.max_tokens}; at least 1 is needed")
    wrong = next((token for token in request.prompt if not 0 <= token <= MAX_TOKEN_ID), None)
    if wrong is not None:
        raise Declined("bad-request", f"{wrong} is no token id; they go from 0 to {MAX_TOKEN_ID}")
    try:
        encode(request.sampling)
    except LocalProtocolError as error:
        raise Declined("bad-request", f"the sampling can't be used: {error}") from error
