"""Which layers this node serves: decides, announces, asks, hands over. See protocols/intent/SPEC.md.

It negotiates; `spans.py` fetches and opens what comes of it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, FatalError, ModelError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes, Watch
from meshnode.core.tasks import Tasks
from meshnode.engine.open_span import OpenSpan
from meshnode.model.fit import Range
from meshnode.model.release import ServedRelease
from meshnode.policy.changeover import PATIENCE_S, may_go_over
from meshnode.policy.guards import abandoned, guards_of
from meshnode.policy.mesh_view import UNMEASURED_LAYER_US, layer_us_of, nodes_of, rate_of
from meshnode.policy.moves import Move, decide, may_leave, still_right, unserved, wanted_plan
from meshnode.policy.patience import Patience
from meshnode.policy.placement import Node
from meshnode.policy.precedence import slot_left_s, slot_of
from meshnode.policy.prediction import Prediction
from meshnode.services.placement.departure import Departure
from meshnode.services.placement.report import PlacementReport
from meshnode.services.placement.wants import want_of
from meshnode.services.port import Directory, Holds, Load, ManySpans, Owner, Releases, Rights
from protocols.advert.messages import DRAINING, IDLE, INTENT, LOADING, SERVING, Advert, Serving, Span
from protocols.errors import ProtocolError
from protocols.ids import PeerId
from protocols.intent import machine as intent
from protocols.intent.messages import Answer, Hold
from protocols.membership.messages import SERVE

GIVING_S: Final = 600.0  # most time that layers are kept for others to take them over, when the owner wants no more
OTHER_RELEASE: Final = "the network serves another release now"

_log = get_logger("placement")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """What this node gives to the mesh."""

    memory_bytes: int  # for weights and KV; 0: this node serves nothing
    rng: random.Random
    wall: Wall
    max_layers: int = 0  # 0: as many as the memory takes
    max_sessions: int = 8
    drain_s: float = 15.0  # most time for handing over before leaving


@dataclass(frozen=True, slots=True)
class OurStage:
    """The layers that this node serves, how busy they are, and whether the owner has it serve."""

    spans: ManySpans
    load: Load
    owner: Owner


class PlacementService:
    """Owns the `serving` part of our advert."""

    name = "placement"

    def __init__(
        self,
        directory: Directory,
        releases: Releases,
        stage: OurStage,
        holds: Holds,
        rights: Rights,
        health: Health,
        settings: PlacementSettings,
    ) -> None:
        """`rights`: without the role serve, this node gives no memory."""
        self._us = PeerId(directory.me().peer)
        self._directory = directory
        self._releases = releases
        self._spans, self._load, self._owner = stage.spans, stage.load, stage.owner
        self._rights = rights
        self._settings = settings
        self._keeper = intent.Keeper()
        self._departure = Departure(self._us, self._keeper, holds)
        self._mover = intent.Mover(settings.rng.random)
        self._patience = Patience()
        self._tasks = Tasks()
        self._events: deque[intent.Event] = deque()
        self._posted = Changes()  # events that came from outside a turn
        self._turned = Changes()
        self._memory = 0  # what we give, as of the last turn
        self._release: ServedRelease | None = None
        self._refused: ServedRelease | None = None  # what can't be opened here, however often it is tried
        self._ready: OpenSpan | None = None  # open, but the switch still waits: for promises, or for the others
        self._ready_since: float | None = None  # while it waits for the others to have the new release
        self._opening = trio.CancelScope()
        self._draining = False
        self._given = not self._owner.duty.serves  # the owner wanted no layers here, and they are gone
        self._give_by = inf  # while others take them over
        self._stops = False  # the whole node
        self._left = False
        self._considered: object = None  # the view in which there was nothing to do
        self._assessed: object = None
        self._live: Mapping[PeerId, Advert] = {}  # as of the last turn
        self._health = health
        self._report = PlacementReport(health)

    # What others see

    @property
    def prediction(self) -> Prediction | None:
        """Of the mesh with the spans that are served or announced now."""
        return self._report.prediction

    def answer_hold(self, peer: PeerId, hold: Hold) -> Answer:
        """Answer a peer that asks us to keep layers. Raises RemoteProtocolError for a hold without layers."""
        serving, want = self._spans.serving, self._mover.want
        standing = intent.Standing(
            span=serving.span if serving else None, target=want.target if want else None, leaving=self._draining
        )
        return self._keeper.asked(peer, hold, standing, trio.current_time())

    async def drain(self) -> None:
        """Leave in good order: take no new sessions, wait until other nodes serve our layers (if they can) and
        our sessions have ended, say goodbye. Takes `PlacementSettings.drain_s` at most.

        If cancelled: the node stays in the draining state.
        """
        self._stops = self._draining = True
        self._post(intent.Cancelled("this node leaves"))
        self._publish()
        with trio.move_on_after(self._settings.drain_s) as limit:
            while not self._may_leave():
                await self._turned.wait()
        if limit.cancelled_caught:
            _log.warning("span.abandoned", reason="nobody took over the layers of this node in time")
        self._left = True
        self._spans.vacate()
        goodbye = Serving(state=IDLE, span=None, target=None)
        self._directory.advertise(replace(self._directory.me(), leaving=True, serving=goodbye))

    # The loop

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Negotiate until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tasks.run)
            causes = (self._directory, self._releases, self._spans, self._load, self._owner)
            watch = Watch(self._posted, *(cause.changes for cause in causes))
            self._check_rights()
            self._publish()
            task_status.started()
            while True:
                wake_at = self._turn()
                self._turned.notify()
                with trio.move_on_at(wake_at):
                    await watch.next()

    def _post(self, event: intent.Event) -> None:
        self._events.append(event)
        self._posted.notify()

    def _turn(self) -> float:
        """Take in what happened and act. Returns when to look again."""
        now = trio.current_time()
        self._live = self._directory.live()  # read once: a turn decides about one view
        self._check_owner(now)
        self._check_rights()
        self._check_release()
        if self._ready is not None and self._ready.lost:
            self._events.append(intent.Refused(f"the engine of the new span is gone: {self._ready.lost}"))
        self._patience.see(
            tuple(
                (peer, advert.incarnation, advert.memory_bytes, advert.max_layers)
                for peer, advert in sorted(self._live.items())
                if advert.memory_bytes and not advert.leaving
            ),
            now,
        )
        over_at = self._go_over(now)
        self._take_events(now)
        if self._mover.deadline is not None and self._mover.deadline <= now:
            self._feed(intent.Expired(), now)
            self._take_events(now)
        look_at = min(over_at, self._consider(now), self._give_by)
        self._publish()
        return look_at if self._mover.deadline is None else min(look_at, self._mover.deadline)

    def _check_owner(self, now: float) -> None:
        """The owner may have us give our layers away while we run, and take some again."""
        if self._stops:
            return
        if self._owner.duty.serves:
            self._draining = self._given = False
            self._give_by = inf
            return
        if self._given:
            return
        if not self._draining:
            self._draining, self._give_by = True, now + GIVING_S
            self._events.append(intent.Cancelled("the owner of this node has it give its layers away"))
        if self._may_leave() or now >= self._give_by:
            self._draining, self._given, self._give_by = False, True, inf
            self._spans.vacate()

    def _check_rights(self) -> None:
        """The role serve may be taken from us while we run, and given back."""
        may = self._rights.has(self._us, SERVE)
        gives = may and not self._is_refused() and not self._given
        self._memory = self._settings.memory_bytes if gives else 0
        if may or not self._settings.memory_bytes:
            self._health.clear("may-not-serve")
            return
        self._health.set("may-not-serve")
        if self._spans.serving is not None:
            self._spans.vacate()
        if self._mover.want is not None:
            self._events.append(intent.Cancelled("this node may not serve any more"))

    def _is_refused(self) -> bool:
        """Whether the release that is served can't be opened here."""
        return self._refused is not None and self._refused is self._releases.current

    def _check_release(self) -> None:
        if self._directory.announcement() is None:
            self._spans.vacate()
        if self._releases.current is self._release:
            return
        self._release = self._releases.current
        if not self._is_refused():
            self._refused = None
            self._health.clear("model-unusable")
        self._considered = self._assessed = self._report.prediction = None
        self._events.append(intent.Cancelled(OTHER_RELEASE))

    def _take_events(self, now: float) -> None:
        while self._events:
            self._feed(self._events.popleft(), now)

    def _feed(self, event: intent.Event, now: float) -> None:
        if not self._mover.expects(event):
            return  # an answer that came after its move was cancelled
        if isinstance(event, intent.Loaded) and self._release is not None:
            late = self._too_late_to_leave(self._release)
            if late:
                event = intent.Refused(late)
        for effect in self._mover.handle(event, now):
            self._perform(effect, now)

    def _perform(self, effect: intent.Effect, now: float) -> None:
        match effect:
            case intent.Announce(target, epoch):
                _log.info("intent.announced", first=target.first, last=target.last, epoch=epoch)
                self._publish()
            case intent.Withdraw(reason):
                _log.info("intent.withdrawn", reason=reason)
                self._publish()
            case intent.Recheck():
                why_not = self._recheck()
                self._events.append(intent.Confirmed() if why_not is None else intent.Refused(why_not))
            case intent.AskHolds(target, exclusive, epoch):
                self._tasks.start_soon(self._ask_holds, target, exclusive, epoch)
            case intent.Vacate():
                self._spans.vacate()
                self._publish()
            case intent.Load(target):
                self._opening = trio.CancelScope()
                self._tasks.start_soon(self._open, target, self._opening)
                self._publish()
            case intent.Switch():
                opened, self._ready = self._ready, None
                assert opened is not None
                self._patience.switched(now)
                self._spans.serve(opened)
                self._publish()
            case intent.Discard():
                self._ready_since = None
                self._opening.cancel()
                opened, self._ready = self._ready, None
                if opened is not None:
                    self._spans.discard(opened)

    async def _open(self, target: Span, scope: trio.CancelScope) -> None:
        """Fetch and open a span; posts Loaded or Failed."""
        release = self._release
        with scope:
            if release is None or release.layers_of(target) is None:
                self._post(intent.Failed(OTHER_RELEASE))
                return
            try:
                opened = await self._spans.open(release, target)
            except ModelError as error:
                # The same bytes will be refused again: nothing is tried before another model is served.
                self._refused = release
                self._health.set("model-unusable", model=release.title, reason=str(error))
                self._post(intent.Failed(str(error)))
                return
            except (TransientError, Declined, FatalError, ProtocolError) as error:
                self._post(intent.Failed(str(error)))
                return
            if scope.cancel_called:
                self._spans.discard(opened)
                return
            self._ready = opened
            self._ready_since = trio.current_time()
            self._posted.notify()

    def _go_over(self, now: float) -> float:
        """Take a span that is open once the others are as far. When to look again."""
        if self._ready is None or self._ready_since is None:
            return inf
        serving, new, ends = self._spans.serving, self._release, self._ready_since + PATIENCE_S
        if serving is not None and new is not None and new.layers_of(serving.span) is None:
            over = may_go_over(self._live, self._us, self._ready.span, new, self._releases.previous)
            if not over and not self._draining and now < ends:
                return ends
        self._ready_since = None
        self._events.append(intent.Loaded())
        return inf

    # What the mesh looks like

    def _nodes(self, release: ServedRelease) -> tuple[Node, ...]:
        """Everybody as placement sees them; ourselves as we are, not as our last advert says."""
        serving, want = self._spans.serving, self._mover.want
        me = Node(
            peer=self._us,
            memory_bytes=self._memory,
            max_layers=self._settings.max_layers,
            rate=rate_of(layer_us_of(self._live).get(self._us, UNMEASURED_LAYER_US)),
            span=release.layers_of(serving.span) if serving else None,
            target=release.layers_of(want.target) if want else None,
            epoch=self._mover.epoch,
            tentative=serving is None and not self._mover.loads,
            draining=self._draining,
        )
        nodes = nodes_of(self._live, release.cid, release.variant_name, release.facts.layers)
        others = (node for node in nodes if node.peer != self._us)
        ours = (me,) if me.memory_bytes or me.span else ()
        return tuple(sorted((*others, *ours), key=lambda node: node.peer))

    # Deciding

    def _consider(self, now: float) -> float:
        """Start a move if there is one to make; keep prediction and health up to date. When to look again."""
        release = self._release
        if release is None or self._left:
            return inf
        nodes, wall = self._nodes(release), self._settings.wall()
        self._patience.judge(broken=bool(unserved(release.facts, nodes)), now=now)
        if nodes != self._assessed:
            self._assessed = nodes
            self._report.assess(release, nodes, self._live, self._memory)
        resting = self._mover.state is intent.State.RESTING and not self._spans.retiring and not self._draining
        if not resting or not self._memory:
            return inf
        slot_end = now + slot_left_s(wall)
        view = (nodes, slot_of(wall))
        if view == self._considered:
            return slot_end
        ready_at = max(self._patience.settled_at, self._spans.rests_until)
        if now < ready_at:
            return ready_at
        move = decide(release.facts, nodes, self._us, slot_of(wall))
        if move is None:
            self._considered = view
            return slot_end
        leaves = bool(abandoned(move.source, move.target, exclusive=move.exclusive))
        fits = move.source is not None or not wanted_plan(release.facts, nodes).holes
        allowed_at = self._patience.allowed_at(move, loses=self._would_lose(nodes, move), fits=fits)
        if now < allowed_at:
            return min(allowed_at, slot_end)
        want = want_of(release, move, self._spans.serving, leaves=leaves, peers=len(nodes), memory=self._memory)
        self._feed(want, now)
        return inf

    def _would_lose(self, nodes: Sequence[Node], move: Move) -> bool:
        """Whether the move gives up layers that nobody else serves."""
        if move.source is None:
            return False
        return bool(guards_of(nodes, self._us, move.source, move.target, exclusive=move.exclusive).missing)

    def _recheck(self) -> str | None:
        """Why the announced move should not go on; None when it should."""
        release, want = self._release, self._mover.want
        if release is None or want is None:
            return OTHER_RELEASE
        if want.leaves and (why_not := self._departure.bound(self._leaving(release))):
            return why_not
        return still_right(release.facts, self._nodes(release), self._us, self._mover.epoch, protect=want.leaves)

    def _leaving(self, release: ServedRelease) -> tuple[Range, ...]:
        """Layers of the present release that the move under way gives up."""
        want, serving = self._mover.want, self._spans.serving
        source = release.layers_of(serving.span) if serving else None
        target = release.layers_of(want.target) if want else None
        if want is None or source is None or target is None:
            return ()
        return abandoned(source, target, exclusive=want.exclusive)

    def _too_late_to_leave(self, release: ServedRelease) -> str | None:
        """A move that was urgent when it began must not take layers from a mesh that answers by now."""
        if self._mover.want is None or self._mover.want.leaves or not self._leaving(release):
            return None
        if unserved(release.facts, self._nodes(release)):
            return None
        return "by now the mesh answers, and must not lose the layers that this node serves"

    async def _ask_holds(self, target: Span, exclusive: bool, epoch: int) -> None:
        """Get a promise for every layer that we leave."""
        reason = await self._promises(target, exclusive, epoch)
        if self._mover.want is not None and self._mover.want.target == target and self._mover.epoch == epoch:
            self._post(intent.Guarded() if reason is None else intent.Refused(reason))

    async def _promises(self, target: Span, exclusive: bool, epoch: int) -> str | None:
        release, serving = self._release, self._spans.serving
        to = None if release is None else release.layers_of(target)
        if release is None or to is None:
            return OTHER_RELEASE
        source = release.layers_of(serving.span) if serving else None
        if source is None:
            return None
        nodes = self._nodes(release)
        return await self._departure.promises(release, nodes, source, to, exclusive=exclusive, epoch=epoch)

    def _may_leave(self) -> bool:
        """Whether a draining node can go: its sessions have ended, and others serve its layers or never can."""
        if self._load.sessions:
            return False
        release, serving = self._release, self._spans.serving
        span = release.layers_of(serving.span) if release and serving else None
        if release is None or span is None:
            return True
        promised = self._keeper.promised(0, release.facts.layers, trio.current_time()) is not None
        return may_leave(release.facts, self._nodes(release), self._us, span, promised=promised)

    # Saying it

    def _publish(self) -> None:
        """Put what we do into our advert, if it changed."""
        if self._left:
            return
        want, serving, gives = self._mover.want, self._spans.serving, self._settings
        if serving is not None:
            state = DRAINING if self._draining else SERVING
        else:
            state = IDLE if want is None else LOADING if self._mover.loads else INTENT
        decode, prefill = self._spans.layer_us
        me = self._directory.me()
        says = replace(
            me,
            memory_bytes=self._memory,
            layer_decode_us=decode,
            layer_prefill_us=prefill,
            trouble=self._report.trouble(),
            serving=Serving(
                state=state,
                span=serving.span if serving else None,
                target=want.target if want else None,
                epoch=self._mover.epoch,
                decode_us=serving.report.decode_us if serving else 0,
                sessions=self._load.sessions if serving else 0,
                max_sessions=gives.max_sessions if serving else 0,
                queue_us=self._load.queue_us if serving else 0,
                ready=self._ready is not None,
            ),
        )
        if says != me:
            self._directory.advertise(says)
