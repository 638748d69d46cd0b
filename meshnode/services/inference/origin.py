"""Asking: one generation from prompt tokens to answer tokens through a route of stages."""

from __future__ import annotations

import array
import math
import random
import sys
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

import trio

from meshnode.core.errors import BadRequest, Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.signal import Watch
from meshnode.core.tasks import Tasks
from meshnode.model.release import ServedRelease
from meshnode.policy.chunking import chunks
from meshnode.policy.kept_prompts import KeptPrompts
from meshnode.policy.route import NoRoute
from meshnode.services.inference.attempts import Attempts
from meshnode.services.inference.receipt import RELEASED, Piece, Receipt, Request, Taken, Vector, Waiting
from meshnode.services.inference.router import Router
from meshnode.services.port import Pipes, ReleasedAdapter, Releases, Rights
from protocols.errors import RemoteProtocolError
from protocols.ids import SESSION_BYTES, Cid, PeerId, short
from protocols.membership.messages import ASK
from protocols.pipe.messages import LOST, Close, Hop, Opened, Pooled, Prefix, Refused, Token
from protocols.pipe.origin import (
    TIMEOUT,
    Begin,
    Emit,
    EmitPooled,
    Expired,
    Failed,
    Finished,
    Origin,
    OriginEffect,
    OriginEvent,
    OriginState,
    PeerGone,
    Received,
    Stop,
    Task,
)
from protocols.pipe.origin import Send as SendEffect
from protocols.pipe.prefixes import prefixes
from protocols.pipe.timeouts import FIRST_OPEN_S, OPEN_S

EVENTS: Final = 256  # messages of one session that wait for us: stages answer once per step
GOODBYE_S: Final = 2.0  # for telling the stages that a session is over
SUPERSEDED: Final = "superseded"  # the prompt must be made anew
FAULTS: Final = frozenset({"engine-lost", "bad-input", "not-ready"})  # refusals that are no mere want of room

_log = get_logger("origin")


class Generation:
    """One attempt at a session: its machine, and the events that wait for it."""

    def __init__(self, machine: Origin, receipt: Receipt, prefixes: tuple[Prefix, ...]) -> None:
        self.machine = machine
        self.receipt = receipt
        self.prefixes = prefixes
        self.goodbyes: list[SendEffect] = []
        self.failure: Exception | None = None
        self.waited_in_vain = False
        # What the reader has not taken yet: no more than the answer's own length.
        self.send, self.receive = trio.open_memory_channel[Taken | Piece | Vector](math.inf)
        self.scope = trio.CancelScope()
        self.over = trio.Event()  # and its stages have been told
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


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all attempts at one answer have in common."""

    key: bytes  # of the session
    request: Request
    max_tokens: int
    prefixes: tuple[Prefix, ...]
    attempts: Attempts


class OriginService:
    """The origin's side of every session this node asks for.

    Each is driven by a task of its own, so that no stage waits for whoever reads the answer.
    """

    name = "origin"

    def __init__(
        self,
        us: PeerId,
        pipes: Pipes,
        router: Router,
        releases: Releases,
        released: ReleasedAdapter,
        rights: Rights,
        rng: random.Random,
    ) -> None:
        self._us = us
        self._pipes = pipes
        self._router = router
        self._releases = releases
        self._released = released
        self._rights = rights
        self._rng = rng
        self._running: dict[bytes, Generation] = {}
        self._kept = KeptPrompts()
        self._tasks = Tasks()
        pipes.handle(Opened, self.receive)
        pipes.handle(Refused, self.receive)
        pipes.handle(Token, self.receive)
        pipes.handle(Pooled, self.receive)
        pipes.on_lost(self.peer_lost)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive what is asked for until cancelled."""
        await self._tasks.run(task_status=task_status)

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

    def receive(self, peer: PeerId, message: Opened | Refused | Token | Pooled, body: bytes, network_us: int) -> None:
        """Take an answer of a stage. Sessions that are over are ignored.

        Raises RemoteProtocolError when the peer may not send it: its pipe is closed.
        """
        generation = self._running.get(message.session)
        if generation is None or generation.machine.attempt != message.attempt:
            return  # it is over, or goes on elsewhere
        if peer not in generation.machine.peers:
            raise RemoteProtocolError(f"{peer} answers for a session that it takes no part in")
        if generation.waiting >= EVENTS:
            raise RemoteProtocolError(f"more than {EVENTS} messages for one session at once")
        generation.put(Received(peer, message, network_us, body))

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """Our connection or pipe to a peer broke: sessions that pass through it go on without it, or fail."""
        for generation in self._running.values():
            if peer in generation.machine.peers:
                generation.put(PeerGone(peer, reason))

    def check_may_ask(self) -> None:
        """See `receipt.Generator`."""
        self._rights.demand(self._us, ASK, "ask questions")

    async def generate(self, request: Request) -> AsyncGenerator[Taken | Waiting | Piece | Vector | Receipt, None]:
        """See `receipt.Generator`."""
        self.check_may_ask()
        release = self._releases.current
        if release is None:
            raise Declined("no-model", self._releases.why_none)
        if not request.prompt:  # what was asked in words may have none
            raise BadRequest("the prompt is empty")
        if request.token_space not in ((), release.token_space):
            raise Declined(
                SUPERSEDED, f"the network serves {release.title} now; the question was read for another model"
            )
        context, vocab = release.manifest.architecture.context, release.manifest.architecture.vocab
        if (token := max(request.prompt)) >= vocab:
            raise BadRequest(
                f"the prompt has the token id {token}; those of {release.manifest.name} end at {vocab - 1}"
            )
        room = context - len(request.prompt)
        if room < (0 if request.pooled else 1):
            raise Declined(
                "too-long",
                f"the prompt has {len(request.prompt)} tokens; the model holds {context} with its answer",
            )
        generation: Generation | None = None
        attempts = Attempts(request.heal_s)
        asked = _Asked(
            key=self._rng.randbytes(SESSION_BYTES),
            request=request,
            max_tokens=0 if request.pooled else min(request.max_tokens, room),
            prefixes=() if request.pooled else prefixes(request.prompt, self._kept.lengths, request.asker.encode()),
            attempts=attempts,
        )
        try:
            while True:
                chosen = self._choose(asked, generation)
                if isinstance(chosen, NoRoute) and attempts.waits():
                    yield Waiting(f"{chosen.reason}; the answer waits for somebody who goes on with it")
                if isinstance(chosen, NoRoute) and attempts.failure is not None:
                    chosen = await self._other_route(asked, generation)
                if isinstance(chosen, NoRoute):
                    if attempts.failure is None:
                        raise Declined("no-route", chosen.reason, retry_ms=chosen.retry_ms)
                    raise attempts.given_up(chosen.reason)
                generation = self._begin(asked, *chosen, generation)
                async for piece in generation.receive:
                    if not isinstance(piece, Taken):
                        attempts.progressed()
                        yield piece
                    elif attempts.taken():
                        yield piece
                failure = generation.failure
                if failure is None:
                    break
                if not isinstance(failure, Declined | PeerUnreachable):
                    raise failure
                ran = generation.machine.began
                attempts.failed(failure, ran=ran, now=trio.current_time())
                _log.info("route.retried", peer=short(failure.peer or ""), reason=str(failure))
                if ran and attempts.goes_on:
                    generation.receipt.lost(failure.peer, str(failure), trio.current_time())
        finally:
            if generation is not None:
                generation.scope.cancel()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                    await generation.over.wait()
        yield generation.receipt

    def _choose(
        self, asked: _Asked, before: Generation | None, *, patient: bool = False
    ) -> tuple[ServedRelease, tuple[Hop, ...]] | NoRoute:
        """The release and route of the next attempt: what has begun goes on with the release that it began with.

        patient: those that may only have been given too little time are asked again.
        """
        seed = self._rng.getrandbits(32)
        avoid = set() if patient else asked.attempts.avoided(trio.current_time())
        kept = [
            one
            for one in self._kept.of(asked.prefixes)
            if one.adapter == self._adapter(Cid(one.manifest), asked.request, before)
        ]
        if before is None or not before.receipt.tokens:
            return self._router.choose(seed, in_flight=self.in_flight(), avoid=avoid, kept=kept)
        release = before.receipt.release
        route = self._router.route(release, seed, in_flight=self.in_flight(), avoid=avoid, kept=kept)
        return route if isinstance(route, NoRoute) else (release, route)

    async def _other_route(
        self, asked: _Asked, before: Generation | None
    ) -> tuple[ServedRelease, tuple[Hop, ...]] | NoRoute:
        """A route without those that have failed; who takes over from a node that left is heard within moments."""
        watch, attempts = Watch(*self._router.changes), asked.attempts
        chosen = self._choose(asked, before)
        while isinstance(chosen, NoRoute) and attempts.has_time(now := trio.current_time()):
            with trio.move_on_at(attempts.look_again_at(now)):
                await watch.next()
            chosen = self._choose(asked, before)
        if isinstance(chosen, NoRoute) and attempts.may_be_slow:
            return self._choose(asked, before, patient=True)
        return chosen

    def _adapter(self, manifest: Cid, request: Request, before: Generation | None) -> str:
        """CID of the one that a question is answered with on this release; "": the bare model.

        before: what has begun goes on with the adapter that it began with.
        """
        if before is not None and before.receipt.tokens:
            return before.receipt.adapter
        return self._released.current(manifest) or "" if request.adapter == RELEASED else request.adapter

    def _begin(
        self, asked: _Asked, release: ServedRelease, route: tuple[Hop, ...], before: Generation | None
    ) -> Generation:
        """The next attempt of a session. Cancel its scope: then it ends on every stage.

        before: the attempt before, whose tokens it goes on with.
        """
        request, key = asked.request, asked.key
        adapter = self._adapter(release.cid, request, before)
        # what a question names itself may have to be fetched, and a grammar needs the tokenizer; what is released
        # is there
        fetched = request.adapter not in ("", RELEASED) or request.grammar is not None
        machine = Origin(
            session=key,
            attempt=asked.attempts.number,
            us=self._us,
            route=route,
            task=Task(
                manifest=release.cid,
                variant=release.variant_name,
                prompt=request.prompt,
                chunks=tuple(chunks(len(request.prompt), request.chunk_rows)),
                max_tokens=asked.max_tokens,
                pooled=release.manifest.architecture.hidden if request.pooled else 0,
                eos=frozenset(release.manifest.architecture.eos_ids),
                sampling=request.sampling,
                grammar=request.grammar,
                adapter=adapter,
                prefixes=asked.prefixes,
                trace=request.trace,
            ),
            drawn=() if before is None else tuple(before.receipt.tokens),
            open_s=OPEN_S if asked.attempts.number or fetched else FIRST_OPEN_S,
        )
        if before is None:
            receipt = Receipt(route, request.prompt, release, adapter=adapter, began=trio.current_time())
        else:
            receipt = before.receipt
            receipt.go_on(route, release, adapter)
        generation = Generation(machine, receipt, asked.prefixes)
        self._running[key] = generation
        self._tasks.start_soon(self._drive, key, generation)
        return generation

    async def _drive(self, key: bytes, generation: Generation) -> None:
        """Feed the machine until the session ends; then, whatever happened, tell its stages that it is over."""
        try:
            with generation.scope, generation.send:
                try:
                    await self._run(generation)
                except Exception as error:  # noqa: BLE001 - it is raised where the answer is read
                    generation.failure = error
            self._learn(generation)
        finally:
            if self._running.get(key) is generation:
                del self._running[key]  # whoever reads the answer may begin another attempt from here on
            stopped = generation.machine.handle(Stop("cancelled"), trio.current_time())
            goodbyes = generation.goodbyes + [effect for effect in stopped if isinstance(effect, SendEffect)]
            # All at once: a stage that takes nothing must not keep the others from hearing of it.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                async with trio.open_nursery() as nursery:
                    for goodbye in goodbyes:
                        nursery.start_soon(self._perform, goodbye)
            generation.over.set()

    def _learn(self, generation: Generation) -> None:
        """Let the router know how it went. Without a name, any stage may have been the silent one."""
        receipt, machine = generation.receipt, generation.machine
        place = (receipt.release.cid, receipt.adapter, receipt.route)
        if machine.began and not machine.cached:
            self._kept.forget(*place, generation.prefixes)
        if generation.failure is None and receipt.arrivals:
            self._kept.remember(*place, generation.prefixes)
        match generation.failure:
            case None if generation.receipt.reason:
                self._router.answered(generation.receipt)
            case PeerUnreachable(peer=None) as error:
                for peer in generation.machine.peers:
                    self._router.failed(PeerId(peer), str(error))
            case PeerUnreachable() as error if error.peer is not None:
                if generation.machine.began or generation.waited_in_vain:  # else we were not connected, that is all
                    self._router.failed(error.peer, str(error))
            case Declined() as error if error.peer is not None and error.code in FAULTS:
                self._router.failed(error.peer, str(error))

    async def _run(self, generation: Generation) -> None:
        """One event, all its effects, the next event. Raises Declined, PeerUnreachable."""
        machine, receipt = generation.machine, generation.receipt
        event: OriginEvent = Begin()
        while True:
            before = machine.state
            effects = self._handle(machine, event)
            if before is OriginState.OPENING and machine.state is OriginState.RUNNING:
                receipt.cached = receipt.cached if receipt.replaced else machine.cached  # as its asker was told
                generation.send.send_nowait(Taken(machine.cached))
            for effect in effects:
                match effect:
                    case SendEffect(message=Close()):
                        generation.goodbyes.append(effect)
                    case SendEffect():
                        failure = await self._perform(effect)
                        if failure is not None:
                            generation.put(PeerGone(effect.peer, failure))
                    case Emit():
                        receipt.came(effect.token, effect.times, effect.return_us, trio.current_time())
                        generation.send.send_nowait(Piece(effect.token, receipt, effect.chances))
                    case EmitPooled(vector=values):
                        generation.send.send_nowait(Vector(values))
                    case Finished(reason):
                        receipt.reason = reason
                        return
                    case Failed(code, reason, peer, retry_ms):
                        gone = None if peer is None else PeerId(peer)
                        generation.waited_in_vain = code == TIMEOUT
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
