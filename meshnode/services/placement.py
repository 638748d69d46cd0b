"""Which layers this node serves: plans, announces, fetches, opens, hands over. See protocols/intent/SPEC.md."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Final, Protocol

import trio

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import ContentUnavailable, Declined, DiskError, EngineLost, FatalError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.sizes import format_size
from meshnode.engine.port import Engine, StageReport, StageSpec
from meshnode.model.facts import ModelFacts, Range, facts_of
from meshnode.policy.mesh_view import coarse_us, layer_us_of, nodes_of
from meshnode.policy.moves import Move, abandoned, decide, guards_of, slot_of, still_right, unserved, wanted_plan
from meshnode.policy.placement import Node, runs
from meshnode.policy.prediction import Prediction, predict
from meshnode.services.port import Directory
from meshnode.store.port import Content, OpenFile
from protocols.advert.messages import DRAINING, IDLE, INTENT, LOADING, SERVING, Head, Serving, Span
from protocols.errors import ProtocolError
from protocols.ids import Cid, PeerId, short
from protocols.intent import machine as intent
from protocols.intent.messages import HOLD_MS, Answer, Hold, NotHeld
from protocols.manifest.messages import FileRef, Manifest

TICK_S: Final = 1.0  # between looks at the engine and the slot when nothing else happens
URGENT_AFTER_S: Final = 2.0  # the mesh must have been without a chain this long before served layers are left for it
FETCHES_AT_ONCE: Final = 4  # files; each is fetched from several peers at once by itself
ENGINE_PAUSE_S: Final = (0.5, 60.0)  # before a lost engine is started again: first, cap
CALM_S: Final = 60.0  # after a switch, no other move for speed alone
NEWS_S: Final = 10.0  # after a peer came or went, no move for speed alone: more may follow
HEALTHY_S: Final = 120.0  # an engine that ran this long was no failure
PINS: Final = (
    "span-0",
    "span-1",
    "span-2",
    "span-3",
)  # names of our pins; known ones, so that a restart can drop them
QUEUE_STEP_US: Final = 3_000  # a change of the wait for the engine that is worth an advert: a token takes as long
GOODBYE_S: Final = 5.0  # for ending the engines when the node stops

_log = get_logger("placement")


class Holds(Protocol):
    async def ask(self, peer: PeerId, hold: Hold) -> Answer: ...


class Fetch(Protocol):
    async def __call__(self, cid: Cid, size: int, *, progress: Callable[[int, int], None]) -> object:
        """Have the complete, verified file in the store; `progress` is called with bytes done and in all."""


Reveal = Callable[[Cid], Awaitable[OpenFile]]  # a file in the store; raises ContentUnavailable
FetchBlock = Callable[[Cid], Awaitable[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    memory_bytes: int  # for weights and KV; 0: this node serves nothing
    max_layers: int = 0  # 0: as many as the memory takes
    threads: int = 1
    max_sessions: int = 8
    kv_bytes: int = 0  # most KV of all sessions; 0: what the weights leave of memory_bytes
    engine: str = "onnx"
    debounce_s: float = 0.6  # after the last peer came or went; peers of one mesh start within moments
    debounce_cap_s: float = 3.0  # since the first of them; also how long an incomplete mesh waits for more peers
    drain_s: float = 15.0  # most time for handing over before leaving
    retire_s: float = 30.0  # most time that sessions of an old span may take to end


@dataclass(frozen=True, slots=True)
class Progress:
    """A span on its way. `phase` is "fetching" or "opening"."""

    span: Span
    phase: str
    files: int
    files_done: int
    bytes_total: int
    bytes_done: int


class Stage:
    """A span that is open and answers. Sessions enter and leave; a span that was replaced ends when they have."""

    def __init__(self, engine: Engine, span: Span, incarnation: int, report: StageReport, began: float) -> None:
        self.engine = engine
        self.span = span
        self.incarnation = incarnation
        self.report = report
        self.began = began  # monotonic seconds
        self.sessions = 0
        self._empty = trio.Event()
        self._empty.set()

    def enter(self) -> None:
        """A session begins on this stage."""
        self.sessions += 1
        if self._empty.is_set():
            self._empty = trio.Event()

    def leave(self) -> None:
        """A session ended."""
        self.sessions -= 1
        if not self.sessions:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Until no session is open. If cancelled: nothing happened."""
        await self._empty.wait()


@dataclass(frozen=True, slots=True)
class _Release:
    """The model that the network serves, as far as we know it."""

    head: Head
    manifest: Manifest
    facts: ModelFacts

    def span(self, layers: Range) -> Span:
        return Span(manifest=self.head.manifest, variant=self.head.variant, first=layers[0], last=layers[1])


class PlacementService:
    """Owns the engine of this node and the `serving` part of its advert."""

    name = "placement"

    def __init__(
        self,
        *,
        peer: PeerId,
        incarnation: int,
        directory: Directory,
        fetch: Fetch,
        fetch_block: FetchBlock,
        reveal: Reveal,
        content: Content,
        open_manifest: Callable[[bytes], Manifest],
        engine_factory: Callable[[StageSpec], Engine],
        config: PlacementConfig,
        health: Health,
        draw: Callable[[], float],
        holds: Holds | None = None,
        wall: Wall = wall_ms,
    ) -> None:
        """`draw` gives uniform numbers in [0, 1). Without `holds`, no move leaves layers before others have them."""
        self._peer = peer
        self._incarnation = incarnation
        self._directory = directory
        self._fetch = fetch
        self._fetch_block = fetch_block
        self._reveal = reveal
        self._content = content
        self._open_manifest = open_manifest
        self._engine_factory = engine_factory
        self._config = config
        self._health = health
        self._holds = holds
        self._wall = wall
        self._draw = draw
        self._keeper = intent.Keeper()
        self._mover = intent.Mover(draw)
        self._announced_ms = 0
        self._release: _Release | None = None
        self._stage: Stage | None = None
        self._loaded: Stage | None = None  # open, but the switch still waits for promises
        self._retiring: list[Stage] = []
        self._pins: dict[Span, str] = {}  # spans whose files are pinned
        self._progress: Progress | None = None
        self._events: deque[intent.Event] = deque()
        self._woken = trio.Event()
        self._turned = trio.Event()
        self._draining = False
        self._left = False
        self._members: tuple[tuple[object, ...], ...] = ()
        self._members_since = 0.0  # when the present change of members began
        self._members_changed = -inf
        self._settled = False
        self._broken_since: float | None = None
        self._engine_failures = 0
        self._not_before = -inf
        self._calm_until = -inf
        self._considered: object = None
        self._prediction: Prediction | None = None
        self._load_scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._manifest_scope: trio.CancelScope | None = None
        self._manifest_wanted: tuple[str, str] | None = None
        self._layer_decode_us = 0
        self._layer_prefill_us = 0
        self._advertised_us = (0, 0)
        self._sessions = 0
        self._queue_us = 0
        self._published: Serving | None = None

    # What others see

    def engine(self) -> Stage | None:
        """What this node serves now; None while nothing, or while it is leaving a span for another."""
        return self._stage

    def progress(self) -> Progress | None:
        """The span that is being fetched or opened."""
        return self._progress

    def prediction(self) -> Prediction | None:
        """How fast the mesh answers one stream with the spans served or announced now; None without a model."""
        return self._prediction

    def release(self) -> tuple[Head, Manifest] | None:
        """The model that the network serves; None until its manifest was fetched and checked."""
        return (self._release.head, self._release.manifest) if self._release else None

    def report_load(self, sessions: int, queue_us: int) -> None:
        """Open sessions and the moving average of the wait for the engine, for the advert (within a second).

        A wait that changed by little is not told: every advert costs every node, in the middle of its tokens.
        """
        self._sessions = sessions
        if abs(queue_us - self._queue_us) > max(QUEUE_STEP_US, self._queue_us // 2):
            self._queue_us = queue_us

    def engine_lost(self, engine: Engine, reason: str) -> None:
        """A step found the engine dead. The span leaves our advert at once and is started again."""
        if self._stage is not None and self._stage.engine is engine:
            self._lose_stage(reason)
            self._wake()

    def answer_hold(self, peer: PeerId, hold: Hold) -> Answer:
        """Answer a peer that asks us to keep layers. Raises RemoteProtocolError for a hold without layers."""
        standing = intent.Standing(
            span=self._stage.span if self._stage else None,
            target=self._mover.want.target if self._mover.want else None,
            leaving=self._draining,
        )
        return self._keeper.asked(peer, hold, standing, trio.current_time())

    async def drain(self, limit_s: float | None = None) -> None:
        """Leave in good order: take no new sessions, wait until other nodes serve our layers (if they can) and
        our sessions have ended, say goodbye. At most `limit_s` seconds (`PlacementConfig.drain_s`).

        If cancelled: the node stays in the draining state.
        """
        self._draining = True
        self._post(intent.Cancelled("this node leaves"))
        self._publish()
        with trio.move_on_after(self._config.drain_s if limit_s is None else limit_s) as limit:
            while self._nursery is not None and not self._may_leave():
                await self._turned.wait()
        if limit.cancelled_caught:
            _log.warning("span.abandoned", reason="nobody took over the layers of this node in time")
        self._left = True
        stage, self._stage = self._stage, None
        self._published = Serving(state=IDLE, span=None, target=None)
        self._directory.advertise(replace(self._directory.me(), leaving=True, serving=self._published))
        if stage is not None:
            await stage.engine.stop()

    # The loop

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Engines are ended on the way out."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            me = replace(
                self._directory.me(), memory_bytes=self._config.memory_bytes, max_layers=self._config.max_layers
            )
            self._directory.advertise(me)
            self._publish()
            for pin in PINS:
                self._content.unpin(pin)
            nursery.start_soon(self._watch)
            task_status.started()
            try:
                while True:
                    wake_at = self._turn()
                    self._turned.set()
                    self._turned = trio.Event()
                    with trio.move_on_at(wake_at):
                        await self._woken.wait()
                    self._woken = trio.Event()
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()
                stages = [s for s in (self._stage, self._loaded, *self._retiring) if s is not None]
                self._stage = self._loaded = None
                with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                    async with trio.open_nursery() as goodbye:
                        for stage in stages:
                            goodbye.start_soon(stage.engine.stop)

    async def _watch(self) -> None:
        while True:
            await self._directory.changes.wait()
            self._wake()

    def _wake(self) -> None:
        self._woken.set()

    def _post(self, event: intent.Event) -> None:
        self._events.append(event)
        self._wake()

    def _turn(self) -> float:
        """Take in what happened and act. Returns when to look again."""
        now = trio.current_time()
        self._check_engine(now)
        self._check_head()
        self._check_members(now)
        while self._events:
            self._feed(self._events.popleft(), now)
        if self._mover.deadline is not None and self._mover.deadline <= now:
            self._feed(intent.Expired(), now)
        while self._events:
            self._feed(self._events.popleft(), now)
        self._consider(now)
        self._publish()
        self._show_progress()
        wakes = [now + TICK_S]
        if self._mover.deadline is not None:
            wakes.append(self._mover.deadline)
        if not self._settled:
            wakes.append(self._settled_at())
        return max(min(wakes), now)

    def _feed(self, event: intent.Event, now: float) -> None:
        if (self._mover.state, type(event)) not in intent.TRANSITIONS:
            return  # an answer that came after its move was cancelled
        if isinstance(event, intent.Loaded) and self._release is not None:
            late = self._too_late_to_leave()
            if late:
                event = intent.Refused(late)
        for effect in self._mover.handle(event, now):
            self._perform(effect, now)

    def _perform(self, effect: intent.Effect, now: float) -> None:
        assert self._nursery is not None
        match effect:
            case intent.Announce(target, epoch):
                self._announced_ms = self._wall()
                _log.info("intent.announced", first=target.first, last=target.last, epoch=epoch)
                self._publish()
            case intent.Withdraw(reason):
                _log.info("intent.withdrawn", reason=reason)
                self._publish()
            case intent.Recheck():
                why_not = self._recheck()
                self._events.append(intent.Confirmed() if why_not is None else intent.Refused(why_not))
            case intent.AskHolds(target, exclusive, epoch):
                self._nursery.start_soon(self._ask_holds, target, exclusive, epoch)
            case intent.Release():
                stage, self._stage = self._stage, None
                if stage is not None:
                    self._retire(stage)
                self._publish()
            case intent.Load(target):
                self._load_scope = trio.CancelScope()
                self._nursery.start_soon(self._load, target, self._load_scope)
                self._publish()
            case intent.Switch(target):
                old, self._stage, self._loaded = self._stage, self._loaded, None
                self._calm_until = now + CALM_S
                if old is not None:
                    self._retire(old)
                _log.info("span.served", first=target.first, last=target.last)
                self._publish()
            case intent.Discard():
                if self._load_scope is not None:
                    self._load_scope.cancel()
                if self._loaded is not None:
                    stage, self._loaded = self._loaded, None
                    self._nursery.start_soon(stage.engine.stop)
                    self._unpin(stage.span)

    # What the mesh looks like

    def _nodes(self) -> tuple[Node, ...]:
        """Everybody as placement sees them; ourselves as we are, not as our last advert says."""
        assert self._release is not None
        head, view = self._release.head, self._directory.live()
        nodes = nodes_of(view, head.manifest, head.variant, self._release.facts.layers)
        speed = layer_us_of(view).get(self._peer, 0) or self._layer_decode_us or _usual(layer_us_of(view))
        want = self._mover.want
        me = Node(
            peer=self._peer,
            memory_bytes=self._config.memory_bytes,
            max_layers=self._config.max_layers,
            rate=max(1, 1_000_000_000 // coarse_us(speed)),
            span=self._range(self._stage.span) if self._stage else None,
            target=self._range(want.target) if want else None,
            epoch=self._mover.epoch,
            tentative=self._stage is None and self._mover.state not in (intent.State.LOADING, intent.State.PARTING),
            draining=self._draining,
        )
        rest = [n for n in nodes if n.peer != self._peer]
        if me.memory_bytes or me.span:
            rest.append(me)
        return tuple(sorted(rest, key=lambda n: n.peer))

    def _range(self, span: Span) -> Range | None:
        """The layers of a span of the present release; None for another release."""
        if self._release is None or self._release.span((span.first, span.last)) != span:
            return None
        return (span.first, span.last)

    def _check_members(self, now: float) -> None:
        members = tuple(
            (peer, advert.incarnation, advert.memory_bytes, advert.max_layers)
            for peer, advert in sorted(self._directory.live().items())
            if advert.memory_bytes and not advert.leaving
        )
        if members != self._members:
            self._members = members
            if self._settled or self._members_changed == -inf:
                self._members_since = now
            self._members_changed = now
            self._settled = False
        if not self._settled and now >= self._settled_at():
            self._settled = True

    def _settled_at(self) -> float:
        return min(self._members_changed + self._config.debounce_s, self._members_since + self._config.debounce_cap_s)

    def _check_head(self) -> None:
        assert self._nursery is not None
        head = self._directory.announcement()
        wanted = None if head is None or head.retired else (head.manifest, head.variant)
        if wanted == self._manifest_wanted:
            return
        self._manifest_wanted = wanted
        if self._manifest_scope is not None:
            self._manifest_scope.cancel()
        self._post(intent.Cancelled("the network serves another release now"))
        self._release = None
        self._prediction = None
        self._considered = None
        if head is None or wanted is None:
            stage, self._stage = self._stage, None
            if stage is not None:
                self._retire(stage)
            return
        self._manifest_scope = trio.CancelScope()
        self._nursery.start_soon(self._learn, head, self._manifest_scope)

    async def _learn(self, head: Head, scope: trio.CancelScope) -> None:
        """Fetch and check the manifest of a head, again and again until it is here."""
        with scope:
            failures = 0
            while True:
                try:
                    cid = Cid(head.manifest)
                    data = self._content.block(cid) or await self._fetch_block(cid)
                    manifest = self._open_manifest(data)
                    facts = facts_of(manifest, head.variant)
                except (TransientError, Declined) as error:
                    _log.warning("manifest.missing", cid=head.manifest, reason=str(error))
                except (FatalError, ProtocolError, KeyError) as error:
                    _log.error("manifest.refused", cid=head.manifest, variant=head.variant, reason=str(error))
                else:
                    self._release = _Release(head, manifest, facts)
                    self._wake()
                    return
                failures += 1
                await trio.sleep(min(30.0, 0.25 * 2**failures))

    # Deciding

    def _consider(self, now: float) -> None:
        """Start a move if there is one to make; keep prediction and health up to date."""
        release = self._release
        if release is None or self._left:
            return
        nodes = self._nodes()
        broken = bool(unserved(release.facts, nodes))
        self._broken_since = (self._broken_since if self._broken_since is not None else now) if broken else None
        key = (release.head.manifest, release.head.variant, nodes, slot_of(self._wall()))
        if key != self._considered:
            self._assess(release, nodes)
        resting = self._mover.state is intent.State.RESTING and not self._retiring and not self._draining
        if not resting or not self._settled or now < self._not_before or not self._config.memory_bytes:
            return
        if key == self._considered:
            return
        decision = decide(release.facts, nodes, self._peer, slot_of(self._wall()))
        if not isinstance(decision, Move):
            self._considered = key
            return
        leaving = abandoned(decision.source, decision.target, exclusive=decision.exclusive)
        if leaving and decision.urgent and (self._broken_since is None or now - self._broken_since < URGENT_AFTER_S):
            return  # the next tick looks again
        if decision.source is None and not self._everybody_is_here(now, nodes):
            return
        calm_at = max(self._calm_until, self._members_changed + NEWS_S)
        if decision.source is not None and not decision.repair and now < calm_at:
            return
        if decision.urgent:
            wait = intent.URGENT_WAIT_S
        elif decision.source is None or decision.repair:
            wait = intent.JOIN_WAIT_S
        else:
            wait = intent.settled_wait_s(len(nodes))
        pause = intent.REPAIR_PAUSE_S if decision.repair else intent.ABORT_PAUSE_S
        # A span of another release is in nobody's plan: it goes when the new one is there, or before if need be.
        stale = self._stage is not None and decision.source is None
        too_much = stale and self._used_bytes() + release.facts.need(*decision.target) > self._config.memory_bytes
        want = intent.Want(
            target=release.span(decision.target),
            source=self._stage.span if self._stage else None,
            leaves=bool(leaving) and not decision.urgent,
            exclusive=decision.exclusive or too_much,
            wait_s=wait,
            pause_s=intent.JOIN_PAUSE_S if decision.source is None else pause,
        )
        self._feed(want, now)

    def _everybody_is_here(self, now: float, nodes: tuple[Node, ...]) -> bool:
        """Whether placing ourselves makes sense yet: at once when the nodes here can hold the model; else a bit
        later, because the places would have to change when the next node comes."""
        assert self._release is not None
        if now >= self._members_since + self._config.debounce_cap_s:
            return True
        return not wanted_plan(self._release.facts, nodes).holes

    def _recheck(self) -> str | None:
        """Why the announced move should not go on; None when it should."""
        if self._release is None or self._mover.want is None:
            return "the network serves another release now"
        want, facts = self._mover.want, self._release.facts
        leaving = self._leaving()
        holder = next((p for a, b in leaving if (p := self._keeper.promised(a, b, trio.current_time()))), None)
        if want.leaves and holder is not None:
            return f"this node promised {short(holder)} to stay"
        return still_right(facts, self._nodes(), self._peer, self._mover.epoch, protect=want.leaves)

    def _leaving(self) -> tuple[Range, ...]:
        """Layers of the present release that the move under way gives up."""
        want = self._mover.want
        source = self._range(self._stage.span) if self._stage else None
        target = self._range(want.target) if want else None
        if want is None or source is None or target is None:
            return ()
        return abandoned(source, target, exclusive=want.exclusive)

    def _too_late_to_leave(self) -> str | None:
        """A move that was urgent when it began must not take layers from a mesh that answers by now."""
        assert self._release is not None
        if self._mover.want is None or self._mover.want.leaves or not self._leaving():
            return None
        if unserved(self._release.facts, self._nodes()):
            return None
        return "by now the mesh answers, and must not lose the layers that this node serves"

    async def _ask_holds(self, target: Span, exclusive: bool, epoch: int) -> None:
        """Get a promise for every layer that we leave."""
        reason = await self._promises(exclusive, epoch)
        if self._mover.want is not None and self._mover.want.target == target and self._mover.epoch == epoch:
            self._post(intent.Guarded() if reason is None else intent.Refused(reason))

    async def _promises(self, exclusive: bool, epoch: int) -> str | None:
        release, want = self._release, self._mover.want
        source = self._range(self._stage.span) if self._stage else None
        target = self._range(want.target) if want else None
        if release is None or target is None:
            return "the network serves another release now"
        if source is None:
            return None
        for first, last in abandoned(source, target, exclusive=exclusive):
            holder = self._keeper.promised(first, last, trio.current_time())
            if holder is not None:
                return f"this node promised {short(holder)} to stay"
        guards = guards_of(self._nodes(), self._peer, source, target, exclusive=exclusive)
        if guards.missing:
            first, last = guards.missing[0]
            return f"nobody else keeps layers {first} to {last - 1}"
        if self._holds is None:
            return "there is no way to ask the others to stay" if exclusive else None
        for guard in guards.holders:
            first, last = guard.layers
            hold = Hold(
                manifest=release.head.manifest,
                variant=release.head.variant,
                first=first,
                last=last,
                epoch=epoch,
                hold_ms=HOLD_MS,
                returns=guard.returns,
            )
            try:
                answer = await self._holds.ask(PeerId(guard.peer), hold)
            except (TransientError, Declined, ProtocolError) as error:
                return f"{short(guard.peer)} could not be asked to keep layers {first} to {last - 1}: {error}"
            if isinstance(answer, NotHeld):
                return f"{short(guard.peer)} does not keep layers {first} to {last - 1}: {answer.reason}"
        return None

    # Loading

    async def _load(self, target: Span, scope: trio.CancelScope) -> None:
        """Fetch and open a span; posts Loaded or Failed. Cancelling `scope` ends an engine that is half open."""
        with scope:
            try:
                stage = await self._open(target)
            except (TransientError, Declined, FatalError, ProtocolError) as error:
                self._progress = None
                _log.warning("span.failed", first=target.first, last=target.last, reason=str(error))
                facts = {"first": target.first, "last": target.last - 1, "reason": str(error)}
                self._health.set("span-failed", model=self._model_name(), **facts)
                self._post(intent.Failed(str(error)))
            else:
                self._loaded = stage
                self._health.clear("span-failed")
                self._measure(stage)
                self._post(intent.Loaded())
        self._progress = None
        if self._loaded is None and scope.cancelled_caught:
            self._unpin(target)

    async def _open(self, target: Span) -> Stage:
        release = self._release
        if release is None or (target.manifest, target.variant) != (release.head.manifest, release.head.variant):
            raise ContentUnavailable("the network serves another release now")
        files = release.manifest.variants[target.variant]
        groups = files.groups(target.first, target.last)
        needed = {f.cid: f for f in (files.graph, *groups.values())}
        await self._get(needed, target)
        while self._retiring and self._stage is None:
            await self._turned.wait()  # an exclusive move: the old span must be gone
        weights = release.facts.weights(target.first, target.last)
        room = max(0, self._config.memory_bytes - weights)
        reserve = release.facts.need(target.first, target.last) - weights
        assert self._progress is not None
        self._progress = replace(self._progress, phase="opening")
        with ExitStack() as opened:
            paths = {cid: opened.enter_context(await self._reveal(cid)) for cid in needed}
            return await self._start(
                StageSpec(
                    kind=self._config.engine,
                    graph=paths[files.graph.cid],
                    groups={name: paths[file.cid] for name, file in groups.items()},
                    first=target.first,
                    last=target.last,
                    architecture=release.manifest.architecture,
                    threads=self._config.threads,
                    max_sessions=self._config.max_sessions,
                    max_kv_bytes=min(room, max(reserve, self._config.kv_bytes)) if self._config.kv_bytes else room,
                ),
                target,
            )

    async def _start(self, spec: StageSpec, target: Span) -> Stage:
        engine = self._engine_factory(spec)
        try:
            report = await engine.start()
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await engine.stop()
            raise
        return Stage(engine, target, self._incarnation, report, trio.current_time())

    async def _get(self, files: Mapping[Cid, FileRef], target: Span) -> None:
        """Have these files on disk, pinned for this span."""
        here: set[Cid] = set()
        done: dict[Cid, int] = {}
        total = sum(file.size for file in files.values())
        for span in [span for span in self._pins if span != target]:
            self._unpin(span)
        free = next(name for name in PINS if name not in self._pins.values() or self._pins.get(target) == name)
        pin = self._pins.setdefault(target, free)
        limiter = trio.CapacityLimiter(FETCHES_AT_ONCE)

        def show() -> None:
            self._progress = Progress(target, "fetching", len(files), len(here), total, sum(done.values()))

        async def one(file: FileRef) -> None:
            def count(so_far: int, _: int) -> None:
                done[file.cid] = so_far
                show()

            async with limiter:
                await self._fetch(file.cid, file.size, progress=count)
            here.add(file.cid)
            count(file.size, file.size)

        show()
        # Before the first fetch: the room for one file must not be made by evicting another one.
        self._content.pin_only(pin, files)
        quota = self._content.usage().quota_bytes
        if total > quota and not self._content.files() >= files.keys():
            raise DiskError(
                f"layers {target.first} to {target.last - 1} need {format_size(total)}, content.quota is "
                f"{format_size(quota)}; raise content.quota, or have this node serve fewer layers (serve.layers)"
            )
        try:
            async with trio.open_nursery() as nursery:
                for file in files.values():
                    nursery.start_soon(one, file)
        except* (TransientError, Declined, FatalError, ProtocolError) as group:
            raise _first(group) from group

    def _measure(self, stage: Stage) -> None:
        """Take the figures of a new engine into the moving averages; advertise them if they changed by a tenth."""
        if self._release is None:
            return
        span, report = stage.span, stage.report
        work = self._release.facts.span_work(span.first, span.last)
        self._layer_decode_us = _average(self._layer_decode_us, max(1, report.decode_us * 1000 // work))
        self._layer_prefill_us = _average(self._layer_prefill_us, max(1, report.prefill_us * 1000 // work))
        now = (self._layer_decode_us, self._layer_prefill_us)
        if any(abs(new - old) * 10 > old for new, old in zip(now, self._advertised_us, strict=True)):
            self._advertised_us = now
            me = replace(self._directory.me(), layer_decode_us=now[0], layer_prefill_us=now[1])
            self._directory.advertise(me)

    # Ending

    def _retire(self, stage: Stage) -> None:
        """End a stage when its sessions have ended, or after `retire_s`."""
        assert self._nursery is not None
        self._retiring.append(stage)
        self._nursery.start_soon(self._end, stage)

    async def _end(self, stage: Stage) -> None:
        with trio.move_on_after(self._config.retire_s):
            await stage.wait_empty()
        await stage.engine.stop()
        self._retiring.remove(stage)
        self._unpin(stage.span)
        self._wake()

    def _unpin(self, span: Span) -> None:
        """Let go of the files of a span that is no longer open, nor wanted."""
        used = [s.span for s in (self._stage, self._loaded, *self._retiring) if s is not None]
        wanted = self._mover.want is not None and self._mover.want.target == span
        if span not in used and not wanted and span in self._pins:
            self._content.unpin(self._pins.pop(span))

    def _check_engine(self, now: float) -> None:
        stage = self._stage
        if stage is not None and stage.engine.rss_bytes == 0:
            self._lose_stage("its process is gone")
        elif stage is not None and now - stage.began >= HEALTHY_S:
            self._engine_failures = 0
            self._health.clear("engine-restarting")

    def _lose_stage(self, reason: str) -> None:
        stage, self._stage = self._stage, None
        assert stage is not None
        now = trio.current_time()
        self._engine_failures += 1
        first, cap = ENGINE_PAUSE_S
        self._not_before = now + min(cap, first * 2 ** (self._engine_failures - 1)) * (0.5 + self._draw())
        self._considered = None
        _log.error("engine.lost", first=stage.span.first, last=stage.span.last, reason=reason)
        self._health.set("engine-restarting", failures=self._engine_failures, reason=reason)
        self._publish()
        if self._nursery is not None:
            stage.sessions = 0
            self._retiring.append(stage)
            self._nursery.start_soon(self._bury, stage)

    async def _bury(self, stage: Stage) -> None:
        await stage.engine.stop()
        self._retiring.remove(stage)
        self._wake()

    def _may_leave(self) -> bool:
        """Whether a draining node can go: its sessions have ended, and others serve its layers or never can."""
        if self._stage is None:
            return not any(stage.sessions for stage in self._retiring)
        if self._stage.sessions:
            return False
        span = self._range(self._stage.span)
        if span is None or self._release is None:
            return True
        others = [n for n in self._nodes() if n.peer != self._peer and not n.draining]
        if wanted_plan(self._release.facts, others).holes if others else True:
            return True  # whoever got a promise of us relied on a mesh that ends anyway
        if self._keeper.promised(0, 1 << 30, trio.current_time()):
            return False
        covered = {layer for n in others if n.span for layer in range(*n.span)}
        return all(layer in covered for layer in range(*span))

    # Saying it

    def _publish(self) -> None:
        """Put what we do into our advert, if it changed."""
        if self._left:
            return
        want, stage = self._mover.want, self._stage
        loading = self._mover.state in (intent.State.LOADING, intent.State.PARTING)
        if stage is not None:
            state = DRAINING if self._draining else SERVING
        else:
            state = IDLE if want is None else LOADING if loading else INTENT
        serving = Serving(
            state=state,
            span=stage.span if stage else None,
            target=want.target if want else None,
            epoch=self._mover.epoch,
            target_since_ms=self._announced_ms if want else 0,
            decode_us=stage.report.decode_us if stage else 0,
            prefill_us=stage.report.prefill_us if stage else 0,
            sessions=self._sessions if stage else 0,
            max_sessions=self._config.max_sessions if stage else 0,
            queue_us=self._queue_us if stage else 0,
        )
        if serving != self._published:
            self._published = serving
            self._directory.advertise(replace(self._directory.me(), serving=serving))

    def _assess(self, release: _Release, nodes: tuple[Node, ...]) -> None:
        """Prediction and health: computed when the mesh changed."""
        facts = release.facts
        model = self._model_name()
        spans = {n.peer: n.place for n in nodes if n.place is not None}
        measured = layer_us_of(self._directory.live())
        self._prediction = predict(
            facts,
            spans,
            {n.peer: measured.get(PeerId(n.peer), 0) or max(1, 1_000_000_000 // n.rate) for n in nodes},
            {n.peer: n.memory_bytes for n in nodes},
        )
        holes = wanted_plan(facts, nodes).holes if nodes else runs(range(facts.layers))
        if holes:
            missing = sum(facts.need(*hole) for hole in holes)
            first, last = holes[0]
            self._health.set("not-covered", first=first, last=last - 1, model=model, missing=format_size(missing))
        else:
            self._health.clear("not-covered")
        memory = self._config.memory_bytes
        least = min(facts.need(layer, layer + 1) for layer in range(facts.layers))
        if memory and memory < least:
            self._health.set("does-not-fit", model=model, memory=format_size(memory), needed=format_size(least))
        else:
            self._health.clear("does-not-fit")

    def _model_name(self) -> str:
        return f"{self._release.manifest.name} {self._release.head.variant}" if self._release else "the model"

    def _show_progress(self) -> None:
        now = self._progress
        if now is None:
            self._health.clear("loading")
            return
        percent = 100 * now.bytes_done // max(1, now.bytes_total)
        words = f"{percent} % of {format_size(now.bytes_total)}" if now.phase == "fetching" else "opening"
        span = {"first": now.span.first, "last": now.span.last - 1}
        self._health.set("loading", model=self._model_name(), progress=words, **span)

    def _used_bytes(self) -> int:
        """Memory of the spans that are open, of whatever release."""
        spec = self._stage.engine.spec if self._stage else None
        return (self._stage.report.weight_bytes + spec.max_kv_bytes) if self._stage and spec else 0


def _average(old: int, new: int) -> int:
    """Exponential moving average with 0.9 for the past."""
    return (9 * old + new) // 10 if old else new


def _usual(speeds: Mapping[PeerId, int]) -> int:
    return sorted(speeds.values())[len(speeds) // 2] if speeds else 1000


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    """One error of a group, to be raised in its place."""
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise EngineLost("an empty group of errors")
