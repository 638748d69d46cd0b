"""Serving a span: sessions of generations pass through our engine, step by step, to the next stage."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog
import trio

from meshnode.core.errors import Declined, EngineLost, PeerUnreachable
from meshnode.engine.port import Engine
from protocols.advert.messages import Span
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, SessionId, short
from protocols.pipe.machine import Ran, StageState, refusal
from protocols.pipe.machine import Stage as Machine
from protocols.pipe.messages import Close, HopTime, Message, Open, Opened, Step

MAX_WAITING_STEPS: Final = 1024  # steps of one session that wait for the engine: a prompt of 256k tokens
RETRY_MS: Final = 2_000  # what a busy stage advises
QUEUE_WEIGHT: Final = 0.1  # of the newest sample in the moving average of the queue

log = structlog.get_logger()

Send = Callable[[PeerId, Message, bytes], Awaitable[None]]


class Served(Protocol):
    """A span that is open and answers (see the placement service)."""

    engine: Engine
    span: Span
    incarnation: int

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class _Session:
    """One session on our stage: its machine, and the steps that wait for the engine."""

    def __init__(self, machine: Machine, served: Served, prompt: tuple[int, ...]) -> None:
        self.machine = machine
        self.served = served
        self.prompt = prompt
        self.scope = trio.CancelScope()
        self.send, self.receive = trio.open_memory_channel[tuple[Step, bytes, int, int]](MAX_WAITING_STEPS)


class StageService:
    """Takes Open, Step and Close of every origin; one task per session keeps its steps in order."""

    name = "stage"

    def __init__(
        self,
        *,
        us: PeerId,
        send: Send,
        serving: Callable[[], Served | None],
        engine_lost: Callable[[Engine, str], None],
    ) -> None:
        """`serving`: the span that is open now. `engine_lost`: told when an engine fails under a session."""
        self._us = us
        self._send = send
        self._serving = serving
        self._engine_lost = engine_lost
        self._sessions: dict[bytes, _Session] = {}
        self._nursery: trio.Nursery | None = None
        self._queue_us = 0.0

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def queue_us(self) -> int:
        """Moving average of how long a step waits for the engine, microseconds."""
        return round(self._queue_us)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; the origins of open sessions notice by our disconnection."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def receive(self, peer: PeerId, message: Open | Step | Close, body: bytes, network_us: int) -> None:
        """Take one message; never waits for the engine.

        Raises RemoteProtocolError when the peer may not send it: its pipe is closed.
        """
        match message:
            case Open():
                await self._open(peer, message, body)
            case Step():
                await self._step(peer, message, body, network_us)
            case Close():
                session = self._sessions.get(message.session)
                if session is not None and session.machine.opening.attempt == message.attempt:
                    if not session.machine.may_close(peer):
                        raise RemoteProtocolError(f"{peer} closed a session of another origin")
                    self._end(session)

    def peer_gone(self, peer: PeerId, reason: str) -> None:
        """Sessions that this peer asked for are over. Those it merely takes part in are ended by their origin."""
        for session in list(self._sessions.values()):
            if session.machine.opening.origin == peer:
                log.info("session.abandoned", origin=short(peer), reason=reason)
                self._end(session)

    async def _open(self, peer: PeerId, opening: Open, body: bytes) -> None:
        if peer != opening.origin:
            raise RemoteProtocolError(f"{peer} opened a session in the name of {opening.origin}")
        machine = Machine(opening, self._us)
        served = self._serving()
        why = self._fence(machine, served)
        if served is None or why:
            await self._tell(peer, refusal(opening, "fenced", why, RETRY_MS))
            return
        old = self._sessions.get(opening.session)
        if old is not None:
            if old.machine.opening.origin != peer or old.machine.opening.attempt >= opening.attempt:
                raise RemoteProtocolError(f"{peer} opened a session id a second time")
            self._end(old)
        if len(body) % 4:
            raise RemoteProtocolError(f"{peer} sent a prompt of {len(body)} bytes; token ids have 4 bytes each")
        prompt = tuple(memoryview(body).cast("i")) if body else ()
        session = _Session(machine, served, prompt)
        self._sessions[opening.session] = session
        if self._nursery is None:
            raise RemoteProtocolError("a session was opened before this node serves")
        self._nursery.start_soon(self._work, session)

    def _fence(self, machine: Machine, served: Served | None) -> str:
        """Why we don't serve exactly what the route says; empty when we do."""
        hop, opening = machine.hop, machine.opening
        if served is None:
            return f"{self._us} serves no layers at the moment"
        span = served.span
        if hop.incarnation != served.incarnation:
            return f"{self._us} was restarted since the route was made"
        if (span.manifest, span.variant) != (opening.manifest, opening.variant):
            return f"{self._us} serves {span.variant} of {short(span.manifest)}, not the model that was asked for"
        if not (span.first <= hop.first and hop.last <= span.last):
            return f"{self._us} serves layers {span.first} to {span.last - 1}, not {hop.first} to {hop.last - 1}"
        return ""

    async def _step(self, peer: PeerId, step: Step, body: bytes, network_us: int) -> None:
        session = self._sessions.get(step.session)
        if session is None:
            return  # its origin has closed it, or is told by the stage that ended it
        try:
            run = session.machine.take(peer, step)
        except RemoteProtocolError as error:
            if peer not in {hop.peer for hop in session.machine.opening.route} | {session.machine.opening.origin}:
                raise
            await self._refuse(session, "fenced", str(error))
            return
        if run is None:
            return
        try:
            session.send.send_nowait((step, body, network_us, time.monotonic_ns()))
        except trio.WouldBlock:
            await self._refuse(
                session, "busy", f"more than {MAX_WAITING_STEPS} steps wait for the engine of {self._us}"
            )

    async def _work(self, session: _Session) -> None:
        """One session from its opening to its end; every way out frees the engine's memory."""
        machine, engine = session.machine, session.served.engine
        opening = machine.opening
        key = SessionId(opening.session)
        session.served.enter()
        try:
            with session.scope:
                try:
                    await engine.open(
                        key,
                        first=machine.hop.first,
                        last=machine.hop.last,
                        capacity=opening.capacity,
                        sampling=opening.sampling,
                        prompt=session.prompt,
                    )
                    opened = Opened(session=opening.session, attempt=opening.attempt, index=opening.index)
                    await self._send(PeerId(opening.origin), opened, b"")
                    async for step, body, network_us, arrived_ns in session.receive:
                        await self._run_step(session, step, body, network_us, arrived_ns)
                except Declined as error:
                    await self._refuse(session, error.code, str(error), error.retry_ms)
                except EngineLost as error:
                    self._engine_lost(engine, str(error))
                    await self._refuse(session, "engine-lost", f"the engine of {self._us} failed: {error}", RETRY_MS)
                except PeerUnreachable as error:
                    await self._refuse(session, "lost", f"{self._us} could not pass a step on: {error}")
                except RemoteProtocolError as error:
                    await self._refuse(session, "fenced", f"{self._us} can't run a step: {error}")
        finally:
            machine.close()
            if self._sessions.get(opening.session) is session:
                del self._sessions[opening.session]
            session.served.leave()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await engine.close(key)

    async def _run_step(self, session: _Session, step: Step, body: bytes, network_us: int, arrived_ns: int) -> None:
        machine = session.machine
        result = await session.served.engine.step(
            SessionId(step.session),
            position=step.position,
            rows=step.rows,
            data=body,
            sample=step.sample and machine.is_last,
            prefill=step.prefill,
        )
        spent_us = (time.monotonic_ns() - arrived_ns) // 1000
        queue_us = max(0, spent_us - result.compute_us)
        self._queue_us += QUEUE_WEIGHT * (queue_us - self._queue_us)
        times = HopTime(network_us=network_us, queue_us=queue_us, compute_us=result.compute_us)
        onward = machine.ran(Ran(step, result.token, times))
        if onward is not None:
            peer, message = onward
            await self._send(PeerId(peer), message, result.data)

    async def _refuse(self, session: _Session, code: str, reason: str, retry_ms: int = 0) -> None:
        if session.machine.state is StageState.CLOSED:
            return
        origin, message = session.machine.refusal(code, reason, retry_ms)
        log.info("session.refused", origin=short(origin), code=code, reason=reason)
        await self._tell(PeerId(origin), message)
        self._end(session)

    async def _tell(self, peer: PeerId, message: Message) -> None:
        """Send bad news; a peer that can't be reached learns it by our silence."""
        try:
            await self._send(peer, message, b"")
        except (PeerUnreachable, Declined) as error:
            log.info("refusal.unsent", peer=short(peer), reason=str(error))

    def _end(self, session: _Session) -> None:
        session.machine.close()
        session.scope.cancel()
        if self._sessions.get(session.machine.opening.session) is session:
            del self._sessions[session.machine.opening.session]
