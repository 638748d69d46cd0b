"""Serving a span: sessions of generations pass through our engine, step by step, to the next stage."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from meshnode.core.errors import Declined, EngineLost, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.tasks import Tasks
from meshnode.core.tracing import NoTracer, Phases, TraceContext, Tracer
from meshnode.model.fit import kv_bytes
from meshnode.policy.shares import Held, Room, victim, why_refused
from meshnode.services.inference.adapters import AdapterService
from meshnode.services.inference.advertised_load import AdvertisedLoad
from meshnode.services.inference.grammars import Course, GrammarService
from meshnode.services.port import OpenSpan, Pipes, Rights, Spans
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, SessionId, short
from protocols.membership.messages import ASK, FORBIDDEN
from protocols.pipe.messages import LOST, Close, HopTime, Message, Open, Step
from protocols.pipe.prefixes import kept_as
from protocols.pipe.stage import Ran, StageSession, StageState, refusal
from protocols.words import layers

MAX_WAITING_STEPS: Final = 1024  # steps of one session that wait for the engine: a prompt of 256k tokens
MAX_UNTOLD: Final = 64  # refusals to one peer that wait for its pipe; further ones it learns by our silence
RETRY_MS: Final = 2_000  # what a stage advises that can't serve a route
BUSY_MS: Final = 1_000  # and one that is full: sessions end all the time

_log = get_logger("stage")


class _Session:
    """One session on our stage: its machine, and the steps that wait for the engine."""

    def __init__(self, machine: StageSession, served: OpenSpan, prompt: tuple[int, ...]) -> None:
        self.machine = machine
        self.served = served
        self.prompt = prompt
        self.course: Course | None = None  # along the grammar of the answer
        self.phases: Phases | None = None  # of its trace, if it has one
        self.rows = self.compute_us = self.queue_us = 0  # of all its steps
        self.trouble = ""  # why we have ended it
        self.keep = False  # whether the rows of its prompt are worth keeping when it has ended
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.waiting_rows = 0  # and those that run
        self.heard_at = trio.current_time()  # of the last step, or when it had run
        self.send, self.receive = trio.open_memory_channel[tuple[Step, bytes, int, float]](MAX_WAITING_STEPS)

    def held(self, now: float) -> Held:
        opening, hop = self.machine.opening, self.machine.hop
        return Held(
            origin=PeerId(opening.origin),
            capacity=opening.capacity,
            kv_bytes=kv_bytes(self.served.engine.spec.architecture, hop.last - hop.first, opening.capacity),
            silent_s=0.0 if self.waiting_rows else now - self.heard_at,
        )


def _request(session: _Session) -> dict[str, str]:
    """By which log lines about one question are found on all nodes; nothing for the probes of a node."""
    trace = session.machine.opening.trace
    return {} if trace is None else {"request": trace.id.hex()}


class StageService:
    """Takes Open, Step and Close of every origin; one task per session keeps its steps in order."""

    name = "stage"

    def __init__(
        self,
        us: PeerId,
        pipes: Pipes,
        spans: Spans,
        load: AdvertisedLoad,
        rights: Rights,
        adapters: AdapterService,
        grammars: GrammarService,
        *,
        prefix_cache: bool = True,
        tracer: Tracer = NoTracer(),
    ) -> None:
        """`load` is kept up to date here. `prefix_cache`: whether rows of prompts outlive their sessions.

        `tracer`: keeps how long each session waits, reads and writes here.
        """
        self._us = us
        self._pipes = pipes
        self._spans = spans
        self._load = load
        self._rights = rights
        self._adapters = adapters
        self._grammars = grammars
        self._prefix_cache = prefix_cache
        self._tracer = tracer
        self._sessions: dict[bytes, _Session] = {}
        self._working: set[_Session] = set()  # those, and others until the engine has let go of them
        self._tasks = Tasks()
        self._untold: Counter[PeerId] = Counter()
        self.taken: Callable[[PeerId], object] = lambda origin: None  # told who asks, for each session of others
        pipes.handle(Open, self._open)
        pipes.handle(Step, self._step)
        pipes.handle(Close, self._close)
        pipes.on_lost(self._peer_lost)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; the origins of open sessions notice by our disconnection."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._load.settle)
            await self._tasks.run(task_status=task_status)

    def _close(self, peer: PeerId, message: Close, _body: bytes, _network_us: int) -> None:
        session = self._sessions.get(message.session)
        if session is not None and session.machine.opening.attempt == message.attempt:
            if not session.machine.may_close(peer):
                raise RemoteProtocolError(f"{peer} closed a session of another origin")
            session.keep = message.keep
            self._end(session)

    def _peer_lost(self, peer: PeerId, reason: str) -> None:
        """Our connection or pipe to a peer broke: its sessions are over, and so are those that pass it steps."""
        for session in list(self._sessions.values()):
            machine = session.machine
            if machine.opening.origin == peer:
                self._refuse(session, "not-ready", f"the way back from {self._us} broke: {reason}", RETRY_MS)
            elif machine.downstream == peer:
                self._refuse(session, LOST, f"{self._us} can't pass a step on: {reason}")

    def _open(self, peer: PeerId, opening: Open, body: bytes, _network_us: int) -> None:
        if peer != opening.origin:
            raise RemoteProtocolError(f"{peer} opened a session in the name of {opening.origin}")
        machine = StageSession(opening, self._us)
        if len(body) % 4 or len(body) > 4 * opening.capacity:
            raise RemoteProtocolError(
                f"{peer} sent a prompt of {len(body)} bytes; token ids have 4 bytes each, "
                f"and the session holds {opening.capacity}"
            )
        if opening.drawn > len(body) // 4:
            raise RemoteProtocolError(f"{peer} sent {len(body) // 4} tokens, {opening.drawn} of them of its answer")
        old = self._sessions.get(opening.session)
        if old is not None and (old.machine.opening.origin != peer or old.machine.opening.attempt >= opening.attempt):
            raise RemoteProtocolError(f"{peer} opened a session id a second time")
        if not self._rights.may(peer, ASK, "asks questions"):
            self._tell_soon(peer, refusal(opening, FORBIDDEN, f"{peer} lacks the role ask, says {self._us}"))
            return
        served = self._spans.serving
        why = self._fence(machine, served)
        if served is None or why:
            self._tell_soon(peer, refusal(opening, "fenced", why, RETRY_MS))
            return
        # also one that has ended: the engine knows it by the same name until it has let go of it
        before = [other for other in self._working if other.machine.opening.session == opening.session]
        if old is not None:
            self._end(old)
        session = _Session(machine, served, struct.unpack(f"<{len(body) // 4}i", body))
        if why := self._make_room(session, before):
            self._tell_soon(peer, refusal(opening, "busy", f"{self._us} is busy: {why}", BUSY_MS))
            return
        session.phases = self._phases(session)
        self._sessions[opening.session] = session
        self._working.add(session)
        self._load.count(len(self._sessions))
        self._tasks.start_soon(self._work, session, before)
        if peer != self._us:
            self.taken(peer)

    def _phases(self, session: _Session) -> Phases | None:
        trace, hop = session.machine.opening.trace, session.machine.hop
        if trace is None:
            return None
        place = TraceContext(trace.id, trace.span, trace.sampled)
        phases = Phases(self._tracer, "stage", place, peer=self._us, first=hop.first, last=hop.last)
        phases.enter("queue")
        return phases

    def _make_room(self, session: _Session, gone: list[_Session]) -> str:
        """Why there is no room for it; empty when there is. Silent sessions that had to go for it join `gone`."""
        now, spec = trio.current_time(), session.served.engine.spec
        wanted, room = session.held(now), Room(spec.max_sessions, spec.max_kv_bytes)
        while True:
            held = {other: other.held(now) for other in self._sessions.values() if other.served is session.served}
            why = why_refused(wanted, held.values(), room)
            used = sum(other.kv_bytes for other in held.values())
            tight = wanted.kv_bytes <= room.kv_bytes < used + wanted.kv_bytes
            silent = victim(wanted, held.values()) if why or tight else None
            if silent is None:
                return why
            (other,) = [other for other, what in held.items() if what is silent]
            gone.append(other)
            self._refuse(other, "idle", f"no step came to {self._us} for {silent.silent_s:.0f} s, and others wait")

    def _fence(self, machine: StageSession, served: OpenSpan | None) -> str:
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
            return f"{self._us} serves {layers(span.first, span.last)}, not {layers(hop.first, hop.last)}"
        return ""

    def _step(self, peer: PeerId, step: Step, body: bytes, network_us: int) -> None:
        session = self._sessions.get(step.session)
        if session is None:
            return  # its origin has closed it, or is told by the stage that ended it
        machine = session.machine
        try:
            run = machine.take(peer, step)
        except RemoteProtocolError as error:
            if peer not in {hop.peer for hop in machine.opening.route} | {machine.opening.origin}:
                raise
            self._refuse(session, "fenced", str(error))
            return
        if not run:
            return
        due = 4 * step.rows * (session.served.engine.spec.architecture.hidden if machine.hop.first else 1)
        if len(body) != due:
            self._refuse_rows(session, f"{peer} sent {len(body)} bytes for {step.rows} rows; {due} are due")
            return
        session.waiting_rows += step.rows
        session.heard_at = trio.current_time()
        try:
            if session.waiting_rows > 2 * machine.opening.capacity:  # all of them, and all of them once more
                raise trio.WouldBlock
            session.send.send_nowait((step, body, network_us, trio.current_time()))
        except trio.WouldBlock:
            self._refuse(session, "busy", f"too many steps of one session wait for the engine of {self._us}")

    async def _work(self, session: _Session, before: Sequence[_Session]) -> None:
        """One session from its opening to its end; every way out frees the engine's memory.

        before: have to be gone from the engine first, for their name or their room.
        """
        machine, engine = session.machine, session.served.engine
        opening = machine.opening
        key = SessionId(opening.session)
        structlog.contextvars.bind_contextvars(**_request(session))  # of this task alone
        session.served.enter()
        try:
            with session.scope:
                for other in before:
                    await other.ended.wait()
                try:
                    async with (
                        self._adapters.lent(session.served, opening.adapter) as adapter,
                        self._grammars.lent(session.served, opening.grammar) as session.course,
                    ):
                        kept = await engine.open(
                            key,
                            first=machine.hop.first,
                            last=machine.hop.last,
                            capacity=opening.capacity,
                            sampling=opening.sampling,
                            prompt=session.prompt,
                            adapter=adapter,
                            pooled=opening.pooled,
                            drawn=opening.drawn,
                            prefixes=kept_as(opening) if self._prefix_cache else (),
                        )
                        if session.course is not None:
                            asked = len(session.prompt) - opening.drawn
                            await session.course.follow(asked, session.prompt[asked:])
                        await self._pass_on(opening.origin, machine.opened(kept))
                        if session.phases is not None:
                            session.phases.enter("")
                        await self._run_steps(session)
                except Declined as error:
                    self._refuse(session, error.code, str(error), error.retry_ms)
                except EngineLost as error:
                    self._spans.engine_lost(engine, str(error))
                    self._refuse(session, "engine-lost", f"the engine of {self._us} failed: {error}", RETRY_MS)
                except PeerUnreachable as error:
                    code = LOST if error.peer == machine.downstream else "not-ready"
                    self._refuse(session, code, f"{self._us} can't pass a step on: {error}")
                except RemoteProtocolError as error:
                    self._refuse_rows(session, f"{self._us} can't run a step: {error}")
        finally:
            self._end(session)
            session.served.leave()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await engine.close(key, keep=session.keep)
            if session.phases is not None:
                session.phases.end(
                    session.trouble, rows=session.rows, compute_us=session.compute_us, queue_us=session.queue_us
                )
            _log.debug(
                "session.ended", origin=short(opening.origin), rows=session.rows, compute_us=session.compute_us
            )
            self._working.discard(session)
            session.ended.set()

    async def _run_steps(self, session: _Session) -> None:
        """One step after the other, until cancelled or nothing comes any more."""
        while True:
            patience = session.machine.patience
            with trio.move_on_after(patience) as silence:
                step, body, network_us, arrived = await session.receive.receive()
            if silence.cancelled_caught:
                self._refuse(session, "idle", f"no step came to {self._us} for {patience:.0f} s")
                return
            await self._run_step(session, step, body, network_us, arrived)
            session.waiting_rows -= step.rows
            session.heard_at = trio.current_time()

    async def _run_step(self, session: _Session, step: Step, body: bytes, network_us: int, arrived: float) -> None:
        machine, course = session.machine, session.course
        sample, after = step.sample and machine.is_last, step.position + step.rows
        if session.phases is not None:
            session.phases.enter("prefill" if step.prefill else "decode")
        mask = await course.mask(after) if course is not None and sample else b""
        result = await session.served.engine.step(
            SessionId(step.session),
            position=step.position,
            rows=step.rows,
            data=body,
            sample=sample,
            prefill=step.prefill,
            mask=mask,
        )
        if course is not None and result.token is not None:
            await course.take(after, result.token)
        spent_us = round((trio.current_time() - arrived) * 1e6)
        queue_us = max(0, spent_us - result.compute_us)
        self._load.waited(queue_us)
        session.rows += step.rows
        session.compute_us += result.compute_us
        session.queue_us += queue_us
        times = HopTime(network_us=network_us, queue_us=queue_us, compute_us=result.compute_us)
        onward = machine.ran(Ran(step, result.token, times, result.chances))
        if onward is not None:
            peer, message = onward
            await self._pass_on(peer, message, result.data)

    async def _pass_on(self, peer: str, message: Message, body: bytes = b"") -> None:
        """Raises PeerUnreachable, also when the peer does not admit us."""
        try:
            await self._pipes.send(PeerId(peer), message, body)
        except Declined as error:
            raise PeerUnreachable(str(error), peer=PeerId(peer)) from error

    def _refuse_rows(self, session: _Session, reason: str) -> None:
        """What came in can't be run: the first stage gets it from the asker, others from the stage before."""
        self._refuse(session, "bad-input" if session.machine.opening.index else "bad-request", reason)

    def _refuse(self, session: _Session, code: str, reason: str, retry_ms: int = 0) -> None:
        if session.machine.state is StageState.CLOSED:
            return
        origin, message = session.machine.refusal(code, reason, retry_ms)
        session.trouble = f"{code}: {reason}"
        _log.info("session.refused", origin=short(origin), code=code, reason=reason, **_request(session))
        self._tell_soon(PeerId(origin), message)
        self._end(session)

    def _tell_soon(self, peer: PeerId, message: Message) -> None:
        """Send bad news from a task of its own: who takes messages must not wait for a peer that takes none."""
        if self._untold[peer] < MAX_UNTOLD:
            self._untold[peer] += 1
            self._tasks.start_soon(self._tell, peer, message)

    async def _tell(self, peer: PeerId, message: Message) -> None:
        """A peer that can't be reached learns it by our silence."""
        try:
            await self._pipes.send(peer, message)
        except (PeerUnreachable, Declined) as error:
            _log.info("refusal.unsent", peer=short(peer), reason=str(error))
        finally:
            self._untold[peer] -= 1
            if not self._untold[peer]:
                del self._untold[peer]

    def _end(self, session: _Session) -> None:
        session.machine.close()
        session.scope.cancel()
        if self._sessions.get(session.machine.opening.session) is session:
            del self._sessions[session.machine.opening.session]
            self._load.count(len(self._sessions))
