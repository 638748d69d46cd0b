"""A small mesh of real placement services in virtual time: gossip that is late or lost, engines that take time.

Everything is seeded. What the world knows and no node does: who really serves what. `watch` sees every change
and tells holes that a node's own move made from holes that a crash made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import trio

from meshnode.core.clock import VirtualWall
from meshnode.core.errors import EngineLost, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.engine.port import StageReport, StageSpec
from meshnode.model.facts import ModelFacts, Range, facts_of
from meshnode.model.release import ServedRelease
from meshnode.services.holds import HoldQuestions
from meshnode.services.inference.load import StageLoad
from meshnode.services.placement import PlacementService, PlacementSettings
from meshnode.services.port import Progress
from meshnode.services.spans import SpansService, SpansSettings
from meshnode.store.port import OpenFile, StoreUsage
from protocols.advert.messages import LEASE_MS, RENEW_MS, Advert, Announcement, Serving
from protocols.ids import RAW, Cid, PeerId, cid_of
from protocols.intent.messages import Answer, Hold
from protocols.manifest.messages import Architecture, FileRef, Manifest, Variant

MB = 1_000_000
ANTI_ENTROPY_S = 5.0


def make_manifest(layers: int = 12, *, layer: int = 10 * MB, embed: int = 15 * MB, head: int = 15 * MB) -> Manifest:
    """A model of equal layers with heavy, tied ends."""
    ends = cid_of(RAW, b"ends")
    variant = Variant(
        name="int4",
        kernel_class="test/1",
        graph=FileRef(cid=cid_of(RAW, b"graph"), size=MB),
        embed=FileRef(cid=ends, size=embed),
        layers=tuple(FileRef(cid=cid_of(RAW, b"layer %d" % i), size=layer) for i in range(layers)),
        head=FileRef(cid=ends, size=head),
        quality=None,
    )
    shape = Architecture(
        family="llama",
        layers=layers,
        hidden=64,
        heads=4,
        kv_heads=1,
        head_dim=16,
        vocab=1000,
        context=2048,
        bos_ids=(1,),
        eos_ids=(2,),
    )
    return Manifest(
        name="tiny",
        version="v1.0.0-0",
        created_ms=1,
        publisher=PeerId("publisher"),
        architecture=shape,
        files={},
        variants={"int4": variant},
    )


class FakeEngine:
    """An engine that takes `load_s` to open and can be killed."""

    def __init__(
        self,
        spec: StageSpec,
        load_s: float,
        layer_us: int,
        failing: Callable[[], bool],
        work: Callable[[int, int], int],
    ) -> None:
        self._spec = spec
        self._load_s = load_s
        self._layer_us = layer_us
        self._failing = failing
        self._work = work
        self.rss_bytes = 0
        self.stopped = False
        self._gone = trio.Event()

    @property
    def spec(self) -> StageSpec:
        return self._spec

    async def start(self) -> StageReport:
        await trio.sleep(self._load_s)
        if self._failing():
            raise EngineLost("the engine process ended before it was ready")
        self.rss_bytes = 100 * MB
        return StageReport(
            pid=1,
            load_ms=round(self._load_s * 1000),
            weight_bytes=MB,
            decode_us=self._work(self._spec.first, self._spec.last) * self._layer_us // 1000,
            prefill_us=50,
        )

    async def stop(self) -> None:
        self.stopped = True
        self.die()

    def die(self) -> None:
        self.rss_bytes = 0
        self._gone.set()

    async def wait_lost(self) -> str:
        await self._gone.wait()
        return "its process is gone"

    async def open(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    async def step(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def close(self, *_: Any) -> None:
        raise NotImplementedError


class FakeContent:
    """The files of one node."""

    def __init__(self, world: World, everything: bool) -> None:
        self._world = world
        self._everything = everything
        self.held: set[Cid] = set()
        self.pins: dict[str, set[Cid]] = {}
        self.quota_bytes = 1 << 40

    def unpin(self, name: str) -> None:
        self.pins.pop(name, None)

    def pin_only(self, name: str, cids: Collection[Cid]) -> None:
        self.pins[name] = set(cids)

    async def fetch(self, file: FileRef, *, progress: Progress | None = None) -> None:
        if not self._everything and file.cid not in self.held:
            await trio.sleep(file.size / self._world.bytes_s / 2)
            if progress is not None:
                progress(file.size // 2, file.size)
            await trio.sleep(file.size / self._world.bytes_s / 2)
        self.held.add(file.cid)

    async def open(self, file: FileRef, *, progress: Progress | None = None) -> OpenFile:
        await trio.lowlevel.checkpoint()
        assert file.cid in self.held
        return OpenFile(Path(file.cid))

    async def block(self, cid: Cid) -> bytes:
        raise NotImplementedError

    def files(self) -> frozenset[Cid]:
        return frozenset(self.held)

    def usage(self) -> StoreUsage:
        room = self.quota_bytes
        return StoreUsage(used_bytes=0, quota_bytes=self.quota_bytes, free_disk_bytes=room, room_bytes=room)


class FakeDirectory:
    """The view of one node: what gossip brought it, expiring by its own clock."""

    def __init__(self, world: World, advert: Advert) -> None:
        self._world = world
        self.advert = advert
        self.known: dict[PeerId, tuple[Advert, float]] = {}
        self.changes = Changes()

    def me(self) -> Advert:
        return self.advert

    def live(self) -> Mapping[PeerId, Advert]:
        limit = trio.current_time() - LEASE_MS / 1000
        live = {peer: advert for peer, (advert, at) in self.known.items() if at > limit and not advert.leaving}
        return {**live, PeerId(self.advert.peer): self.advert}

    def announcement(self) -> Announcement | None:
        return self._world.head

    def announcements(self) -> Mapping[PeerId, Announcement]:
        return {} if self._world.head is None else {PeerId(self._world.head.peer): self._world.head}

    def announce(self, **_: Any) -> Announcement:
        raise NotImplementedError

    def providers(self, cid: Cid) -> Sequence[PeerId]:
        raise NotImplementedError

    def advertise(self, advert: Advert) -> None:
        self.advert = replace(advert, sequence=advert.sequence + 1)
        self._world.changed(self.advert)
        self._world.gossip(self.advert)
        self.changes.notify()

    def renew(self) -> None:
        self.advert = replace(self.advert, sequence=self.advert.sequence + 1)
        self._world.gossip(self.advert)

    def hear(self, advert: Advert) -> None:
        old = self.known.get(PeerId(advert.peer))
        if old is not None and (old[0].incarnation, old[0].sequence) >= (advert.incarnation, advert.sequence):
            return
        self.known[PeerId(advert.peer)] = (advert, trio.current_time())
        if old is None or replace(old[0], sequence=0) != replace(advert, sequence=0):
            self.changes.notify()


class FakeReleases:
    """The announced release, whose manifest is always here."""

    why_none = "nothing is announced"

    def __init__(self, world: World, directory: FakeDirectory) -> None:
        self._world = world
        self._known: ServedRelease | None = None
        self.changes = directory.changes

    @property
    def current(self) -> ServedRelease | None:
        head = self._world.head
        if head is None:
            self._known = None
        elif self._known is None or self._known.cid != head.manifest:
            manifest = self._world.manifest
            self._known = ServedRelease(Cid(head.manifest), head.variant, manifest, facts_of(manifest, head.variant))
        return self._known


@dataclass
class Member:
    peer: PeerId
    service: PlacementService
    spans: SpansService
    load: StageLoad
    directory: FakeDirectory
    content: FakeContent
    health: Health
    scope: trio.CancelScope
    engines: list[FakeEngine] = field(default_factory=list)
    failing: bool = False

    @property
    def span(self) -> Range | None:
        stage = self.spans.engine()
        return (stage.span.first, stage.span.last) if stage else None


class World:
    """Nodes, the gossip between them, and an eye on what is really served."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        seed: int = 0,
        manifest: Manifest | None = None,
        loss: float = 0.0,
        delay_s: tuple[float, float] = (0.02, 0.1),
        load_s: float = 1.0,
        bytes_s: float = 1000 * MB,
    ) -> None:
        self.manifest = manifest or make_manifest()
        self.facts: ModelFacts = facts_of(self.manifest, "int4")
        self.head: Announcement | None = Announcement(
            peer="publisher",
            incarnation=1,
            sequence=1,
            created_ms=1,
            name="tiny",
            version="v1.0.0-0",
            manifest="bafymanifest",
            variant="int4",
        )
        self.members: dict[PeerId, Member] = {}
        self.moves = 0
        self.voluntary_holes: list[str] = []
        self.forced_leaves: list[str] = []  # a person's order to leave that left a hole when its time was up
        self.covered_at: float | None = None
        self._nursery = nursery
        self._rng = random.Random(seed)
        self._loss = loss
        self._delay = delay_s
        self._load_s = load_s
        self.bytes_s = bytes_s
        self._wall = VirtualWall()
        self._before: dict[PeerId, Serving | None] = {}
        self._event = trio.Event()
        self.partition: frozenset[PeerId] = frozenset()  # these can't talk to the others

    def need(self, first: int, last: int) -> int:
        return self.facts.need(first, last)

    def _apart(self, one: PeerId, other: PeerId) -> bool:
        return (one in self.partition) != (other in self.partition)

    def gossip(self, advert: Advert) -> None:
        sender = PeerId(advert.peer)
        for member in list(self.members.values()):
            if member.peer != sender and not self._apart(sender, member.peer) and self._rng.random() >= self._loss:
                self._nursery.start_soon(self._deliver, member, advert, self._rng.uniform(*self._delay))

    async def _deliver(self, member: Member, advert: Advert, delay: float) -> None:
        await trio.sleep(delay)
        if member.peer in self.members:
            member.directory.hear(advert)

    async def _life(self, member: Member) -> None:
        """Renewal and anti-entropy of one node."""
        last_sync = trio.current_time()
        while True:
            await trio.sleep(RENEW_MS / 1000)
            member.directory.renew()
            others = [m for m in self.members.values() if m is not member]
            if others and trio.current_time() - last_sync >= ANTI_ENTROPY_S:
                last_sync = trio.current_time()
                other = self._rng.choice(others)
                if not self._apart(member.peer, other.peer):
                    for advert, at in list(other.directory.known.values()):
                        if advert.peer != member.peer and at > trio.current_time() - LEASE_MS / 1000:
                            member.directory.hear(advert)
                    member.directory.hear(other.directory.advert)
            member.directory.changes.notify()  # leases run out without a message

    async def ask(self, asker: PeerId, peer: PeerId, hold: Hold) -> Answer:
        await trio.sleep(self._rng.uniform(*self._delay))
        if peer not in self.members or self._apart(asker, peer) or self._rng.random() < self._loss / 4:
            raise PeerUnreachable("no answer", peer=peer)
        return self.members[peer].service.answer_hold(asker, hold)

    async def join(
        self,
        name: str,
        memory: int,
        *,
        max_layers: int = 0,
        layer_us: int = 1000,
        everything: bool = False,
    ) -> Member:
        peer = PeerId(name)
        advert = Advert(
            peer=peer,
            incarnation=self._wall(),
            sequence=0,
            name=name,
            addresses=(),
            memory_bytes=memory,
            max_layers=max_layers,
            serving=None,
        )
        directory = FakeDirectory(self, advert)
        content = FakeContent(self, everything)
        health = Health()
        world = self
        member: Member

        class Asker(HoldQuestions):
            async def ask(self, other: PeerId, hold: Hold) -> Answer:
                return await world.ask(peer, other, hold)

        def engine(spec: StageSpec) -> FakeEngine:
            made = FakeEngine(spec, self._load_s, layer_us, lambda: member.failing, self.facts.span_work)
            member.engines.append(made)
            return made

        rng = random.Random(f"{name}{self._rng.random()}")
        spans = SpansService(
            content,
            content,
            engine,
            health,
            SpansSettings(incarnation=advert.incarnation, memory_bytes=memory, rng=rng),
        )
        load = StageLoad()
        service = PlacementService(
            directory,
            FakeReleases(self, directory),
            spans,
            Asker(cast(Any, None)),
            load,
            health,
            PlacementSettings(memory_bytes=memory, rng=rng, wall=self._wall, max_layers=max_layers),
        )
        member = Member(peer, service, spans, load, directory, content, health, trio.CancelScope())
        self.members[peer] = member
        await self._nursery.start(self._run, member)
        # A new connection starts with an exchange of what both sides know.
        for other in list(self.members.values()):
            if other is not member:
                member.directory.hear(other.directory.advert)
        return member

    async def _run(self, member: Member, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with member.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._life, member)
                await nursery.start(member.spans.run)
                await member.service.run(task_status=task_status)

    def kill(self, peer: PeerId) -> None:
        """The node is gone without a word."""
        member = self.members.pop(peer)
        self._before.pop(peer, None)
        member.scope.cancel()
        self._note()

    # What is really served

    def spans(self) -> dict[PeerId, Range]:
        out = {}
        for peer, member in self.members.items():
            serving = member.directory.advert.serving
            if serving is not None and serving.span is not None and not member.directory.advert.leaving:
                out[peer] = (serving.span.first, serving.span.last)
        return out

    def holes(self) -> list[int]:
        covered = {layer for span in self.spans().values() for layer in range(*span)}
        return [layer for layer in range(self.facts.layers) if layer not in covered]

    def changed(self, advert: Advert) -> None:
        """A node changed what it serves. If it did so of its own will and made a hole in a complete mesh: note it."""
        peer = PeerId(advert.peer)
        if peer not in self.members:
            return
        old, new = self._before.get(peer), advert.serving
        self._before[peer] = new
        before = old.span if old else None
        after = new.span if new and not advert.leaving else None
        if before != after:
            self.moves += before is not None
            crashed = any(e.rss_bytes == 0 and not e.stopped for e in self.members[peer].engines if after is None)
            if before is not None and self.covered_at is not None and self.holes() and not crashed:
                holes = self.forced_leaves if advert.leaving else self.voluntary_holes
                holes.append(f"{trio.current_time():.2f}: {peer} left {before} for {after}")
            self._note()

    def _note(self) -> None:
        if self.holes():
            self.covered_at = None
        elif self.covered_at is None:
            self.covered_at = trio.current_time()
        self._event.set()
        self._event = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on what is served."""
        while not condition():
            await self._event.wait()

    async def covered(self, limit_s: float) -> float:
        """Seconds until every layer is served."""
        began = trio.current_time()
        with trio.fail_after(limit_s):
            await self.until(lambda: not self.holes())
        return trio.current_time() - began

    def state(self, peer: PeerId) -> str:
        serving = self.members[peer].directory.advert.serving
        return serving.state if serving else "none"
