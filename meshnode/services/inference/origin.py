"""Asking: one generation from prompt tokens to answer tokens through a route of stages."""

from __future__ import annotations

import array
import math
import random
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Final

import trio

from meshnode.core.errors import BadRequest, Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.signal import Watch
from meshnode.model.release import ServedRelease
from meshnode.policy.chunking import chunks
from meshnode.policy.route import NoRoute
from meshnode.services.inference.receipt import Piece, Receipt, Request
from meshnode.services.inference.router import Router
from meshnode.services.port import Pipes, Releases
from protocols.errors import RemoteProtocolError
from protocols.ids import SESSION_BYTES, PeerId, short
from protocols.pipe.messages import LOST, Close, Hop, Opened, Refused, Token
from protocols.pipe.origin import (
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
from protocols.pipe.origin import Send as SendEffect

EVENTS: Final = 256  # messages of one session that wait for us: stages answer once per step
GOODBYE_S: Final = 2.0  # for telling the stages that a session is over
TAKEOVER_S: Final = 2.0  # for the news who serves the layers of a node that has gone
OPEN_ATTEMPTS: Final = 3  # routes that are tried when a stage refuses before the first token
RETRY_CODES: Final = frozenset({"fenced", "busy", "not-ready", "engine-lost", "bad-input", "too-long", LOST})

_log = get_logger("origin")


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


class OriginService:
    """The origin's side of every session this node asks for."""

    def __init__(self, us: PeerId, pipes: Pipes, router: Router, releases: Releases, rng: random.Random) -> None:
        self._us = us
        self._pipes = pipes
        self._router = router
        self._releases = releases
        self._rng = rng
        self._running: dict[bytes, Generation] = {}
        pipes.handle(Opened, self.receive)
        pipes.handle(Refused, self.receive)
        pipes.handle(Token, self.receive)
        pipes.on_lost(self.peer_lost)

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

    def receive(self, peer: PeerId, message: Opened | Refused | Token, _: bytes, network_us: int) -> None:
        """Take an answer of a stage. Sessions that are over are ignored.

        Raises RemoteProtocolError when the peer may not send it: its pipe is closed.
        """
        generation = self._running.get(message.session)
        if generation is None:
            return
        if peer not in generation.machine.peers:
            raise RemoteProtocolError(f"{peer} answers for a session that it takes no part in")
        if generation.waiting >= EVENTS:
            raise RemoteProtocolError(f"more than {EVENTS} messages for one session at once")
        generation.put(Received(peer, message, network_us))

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """Our connection or pipe to a peer broke: sessions that pass through it fail at once."""
        for generation in self._running.values():
            if peer in generation.machine.peers:
                generation.put(PeerGone(peer, reason))

    async def generate(self, request: Request) -> AsyncGenerator[Piece | Receipt, None]:
        """See `receipt.Generator`."""
        release = self._releases.current
        if release is None:
            raise Declined("no-model", self._releases.why_none)
        if not request.prompt:  # what was asked in words may have none
            raise BadRequest("the prompt is empty")
        context, vocab = release.manifest.architecture.context, release.manifest.architecture.vocab
        if (token := max(request.prompt)) >= vocab:
            raise BadRequest(
                f"the prompt has the token id {token}; those of {release.manifest.name} end at {vocab - 1}"
            )
        room = context - len(request.prompt)
        if room < 1:
            raise Declined(
                "too-long",
                f"the prompt has {len(request.prompt)} tokens; the model holds {context} with its answer",
            )
        avoid: set[PeerId] = set()
        failure: Declined | PeerUnreachable | None = None
        for attempt in range(OPEN_ATTEMPTS):
            seed = self._rng.getrandbits(32)
            route = self._router.route(release, seed, in_flight=self.in_flight(), avoid=avoid)
            if isinstance(route, NoRoute) and failure is not None:
                route = await self._other_route(release, seed, avoid)
            if isinstance(route, NoRoute):
                # That there is no other way is no news; why this one failed is.
                raise failure or Declined("no-route", route.reason, retry_ms=route.retry_ms)
            started = False
            try:
                async with (
                    self._session(release, route, request, min(request.max_tokens, room)) as generation,
                    aclosing(self._drive(generation)) as pieces,
                ):
                    async for piece in pieces:
                        started = True
                        yield piece
            except (Declined, PeerUnreachable) as error:
                code = error.code if isinstance(error, Declined) else LOST
                if started or code not in RETRY_CODES or error.peer is None or attempt == OPEN_ATTEMPTS - 1:
                    raise
                _log.info("route.retried", peer=short(error.peer), reason=str(error))
                avoid.add(error.peer)
                failure = error
            else:
                yield generation.receipt
                return

    async def _other_route(self, release: ServedRelease, seed: int, avoid: set[PeerId]) -> tuple[Hop, ...] | NoRoute:
        """A route without those that have failed; who takes over from a node that left is heard within moments."""
        watch = Watch(*self._router.changes)
        route = self._router.route(release, seed, in_flight=self.in_flight(), avoid=avoid)
        with trio.move_on_after(TAKEOVER_S):
            while isinstance(route, NoRoute):
                await watch.next()
                route = self._router.route(release, seed, in_flight=self.in_flight(), avoid=avoid)
        return route

    @asynccontextmanager
    async def _session(
        self, release: ServedRelease, route: tuple[Hop, ...], request: Request, max_tokens: int
    ) -> AsyncIterator[Generation]:
        """Registers a session and, whatever happens, tells its stages that it is over."""
        key = self._rng.randbytes(SESSION_BYTES)
        machine = Origin(
            session=key,
            attempt=0,
            us=self._us,
            manifest=release.cid,
            variant=release.variant_name,
            route=route,
            prompt=request.prompt,
            chunks=chunks(len(request.prompt), request.chunk_rows),
            max_tokens=max_tokens,
            eos=frozenset(release.manifest.architecture.eos_ids),
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
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
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
            _log.warning("stage.misbehaved", peer=short(event.peer), reason=str(error))
            gone = PeerGone(event.peer, f"it broke the rules of the pipe: {error}")
            return machine.handle(gone, trio.current_time())

    async def _perform(self, effect: SendEffect) -> str | None:
        """Send one message. Returns why it could not be sent."""
        body = array.array("i", effect.body)
        if sys.byteorder == "big":
            body.byteswap()
        try:
            await self._pipes.send(PeerId(effect.peer), effect.message, body.tobytes())
        except (PeerUnreachable, Declined) as error:
            return str(error)
        return None
