"""Nodes that serve spans of a model of plain arithmetic and ask each other, on the in-memory network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import trio

from meshnode.core.errors import EngineLost
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.engine import local
from meshnode.engine.port import AdapterSpec, Engine, StageSpec, StepResult
from meshnode.engine.requests import adapt_request
from meshnode.model.fit import facts_of
from meshnode.model.release import ServedRelease
from meshnode.net.pipes import Pipes
from meshnode.services.inference.adapters import AdapterService
from meshnode.services.inference.advertised_load import AdvertisedLoad
from meshnode.services.inference.grammars import GrammarService
from meshnode.services.inference.origin import OriginService
from meshnode.services.inference.receipt import RELEASED, Piece, Receipt, Request, Taken, Vector
from meshnode.services.inference.router import Router
from meshnode.services.inference.stage import StageService
from meshnode.sim.model import ModelSpec, make_model
from meshnode.sim.network import MemoryHost, MemoryNetwork
from meshnode.text.in_process import open_in_process
from protocols.advert.messages import SERVING, Advert, Serving, Span
from protocols.ids import Cid, PeerId, SessionId
from protocols.manifest.messages import Architecture
from protocols.pipe.messages import Grammar, Sampling
from tests.adapters import Shelf
from tests.adverts import MANIFEST, advert_of, key_of, peer_of
from tests.everything import EVERYTHING

LAYERS = 9
SHAPE = Architecture(
    family="null",
    layers=LAYERS,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocab=211,
    context=256,
    bos_ids=(1,),
    eos_ids=(2,),
)
_MANIFEST = replace(make_model(ModelSpec(layers=LAYERS), key_of(1), 1).manifest, architecture=SHAPE)
RELEASE = ServedRelease(MANIFEST, "int4", _MANIFEST, facts_of(_MANIFEST, "int4"))
GREEDY = Sampling(seed=0)
PROMPT = (5, 6, 7, 8, 9)


class LocalEngine(local.LocalEngine):
    """The null engine in virtual time, which can be held up, killed and made to tamper."""

    def __init__(self, first: int, last: int, *, max_sessions: int = 8, max_kv_bytes: int = 1 << 30) -> None:
        super().__init__(
            StageSpec(
                kind="null",
                graph=Path(),
                groups={},
                first=first,
                last=last,
                architecture=SHAPE,
                threads=1,
                max_sessions=max_sessions,
                max_kv_bytes=max_kv_bytes,
            )
        )
        self.open_sessions: set[bytes] = set()
        self.dies_after: int | None = None  # steps
        self.tampers: Callable[[StepResult], StepResult] = lambda result: result
        self.held: trio.Event | None = None  # steps wait for it
        self.steps: list[tuple[int, int]] = []  # (position, rows) of each
        self.changed: Callable[[], None] = lambda: None
        self.adapters: list[str] = []  # loaded at the moment, in the order in which they came
        self.adaptations = 0

    async def adapt(self, adapter: AdapterSpec) -> None:
        self.adaptations += 1
        await super().adapt(adapter)
        self.adapters.append(adapter.name)
        self.changed()

    async def drop(self, adapter: str) -> None:
        await super().drop(adapter)
        if adapter in self.adapters:
            self.adapters.remove(adapter)

    async def open(self, session: SessionId, **settings: Any) -> int:
        rows = await super().open(session, **settings)
        self.open_sessions.add(session)
        return rows

    async def step(self, session: SessionId, *, position: int, rows: int, **settings: Any) -> StepResult:
        if self.dies_after is not None and len(self.steps) >= self.dies_after:
            raise EngineLost("it was killed by SIGKILL")
        self.steps.append((position, rows))
        if self.held is not None:
            await self.held.wait()
        return self.tampers(await super().step(session, position=position, rows=rows, **settings))

    async def close(self, session: SessionId, *, keep: bool = False) -> None:
        await super().close(session, keep=keep)
        self.open_sessions.discard(session)
        self.changed()


@dataclass
class Served:
    """The span of a member, and how many sessions hold on to it."""

    engine: LocalEngine
    span: Span
    incarnation: int = 1
    sessions: int = 0

    def enter(self) -> None:
        self.sessions += 1

    def leave(self) -> None:
        self.sessions -= 1


class Released:
    """Which adapter the network answers with."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.adapter: Cid | None = None

    def current(self, base: Cid) -> Cid | None:
        return self.adapter if base == MANIFEST else None

    def kept(self, base: Cid) -> Sequence[Cid]:
        current = self.current(base)
        return [] if current is None else [current]

    def release(self, adapter: Cid | None) -> None:
        self.adapter = adapter
        self.changes.notify()


@dataclass
class Member:
    number: int
    host: MemoryHost
    pipes: Pipes
    served: Served | None
    span: Span | None  # as its advert says
    engine_failures: list[str] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    load: AdvertisedLoad = field(default_factory=AdvertisedLoad)
    health: Health = field(default_factory=Health)
    changes: Changes = field(default_factory=Changes)  # of `serving`
    adapters: AdapterService = field(init=False)
    stage: StageService = field(init=False)
    origin: OriginService = field(init=False)

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id

    @property
    def local(self) -> LocalEngine:
        assert self.served is not None
        return self.served.engine

    @property
    def serving(self) -> Served | None:
        return self.served

    def engine_lost(self, engine: Engine, reason: str) -> None:
        self.engine_failures.append(reason)

    def kill(self) -> None:
        """End at once, like a killed process."""
        self.host.stop()
        self.scope.cancel()

    async def ask(
        self,
        prompt: Sequence[int] = PROMPT,
        *,
        most: int = 12,
        sampling: Sampling = GREEDY,
        chunk_rows: int = 256,
        adapter: str = RELEASED,
        grammar: Grammar | None = None,
        each: Callable[[int], object] = lambda _: None,
    ) -> Receipt:
        """One generation to its end; `each` hears of the number of tokens so far."""
        count = 0
        request = Request(tuple(prompt), most, sampling, chunk_rows, adapter, grammar)
        async with aclosing(self.origin.generate(request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Receipt):
                    return piece
                if isinstance(piece, Piece):
                    count += 1
                    each(count)
        raise AssertionError("the receipt is missing")

    async def embed(self, prompt: Sequence[int] = PROMPT, *, chunk_rows: int = 256) -> tuple[float, ...]:
        """A prompt as one vector."""
        request = Request(tuple(prompt), 1, GREEDY, chunk_rows, pooled=True)
        async with aclosing(self.origin.generate(request)) as pieces:
            taken, vector, receipt = [piece async for piece in pieces]
        assert isinstance(taken, Taken) and isinstance(receipt, Receipt) and isinstance(vector, Vector)
        assert (receipt.reason, receipt.tokens, receipt.prompt) == ("pooled", [], tuple(prompt))
        return vector.values


class Mesh:
    """Starts members; all are connected and admitted."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.members: list[Member] = []
        self.changes = Changes()  # of `live` and `current`
        self.current: ServedRelease | None = RELEASE
        self.previous: ServedRelease | None = None
        self.why_none = "the network serves no model yet"
        self.content = Shelf()
        self.released = Released()
        self.prefer: PeerId | None = None  # looks faster than it is
        self._nursery = nursery
        self._change = trio.Event()

    async def start(
        self, first: int = 0, last: int = 0, *, max_sessions: int = 8, max_kv_bytes: int = 1 << 30
    ) -> Member:
        """A node that serves layers [first, last), or none."""
        number = len(self.members) + 1
        host = self.network.host(peer_of(number))
        span = Span(manifest=MANIFEST, variant="int4", first=first, last=last)
        engine = LocalEngine(first, last, max_sessions=max_sessions, max_kv_bytes=max_kv_bytes)
        engine.changed = self._changed
        served = Served(engine, span) if last else None
        member = Member(number, host, Pipes(host), served, served.span if served else None)
        member.adapters = AdapterService(self.content, member, self.released)  # type: ignore[arg-type]
        grammars = GrammarService(self, self.content, open_in_process)  # type: ignore[arg-type]
        member.stage = StageService(
            member.peer, member.pipes, member, member.load, EVERYTHING, member.adapters, grammars
        )
        router = Router(member.peer, self, self, member.health)
        member.origin = OriginService(
            member.peer, member.pipes, router, self, self.released, EVERYTHING, random.Random(number)
        )
        await self._nursery.start(self._run, member)
        for other in self.members:
            if other.peer in self.network.hosts:
                member.host.admit(other.peer, True)
                other.host.admit(member.peer, True)
                await member.host.connect(other.peer, other.host.addresses)
        self.members.append(member)
        return member

    async def _run(self, member: Member, *, task_status: trio.TaskStatus[None]) -> None:
        with member.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(member.host.run)
                await nursery.start(member.pipes.run)
                await nursery.start(member.adapters.run)
                await nursery.start(member.stage.run)
                await nursery.start(member.origin.run)
                task_status.started()

    def live(self) -> dict[PeerId, Advert]:
        """Every member that says it serves something."""
        return {
            member.peer: advert_of(
                member.number,
                incarnation=1,
                serving=Serving(
                    state=SERVING,
                    span=span,
                    target=None,
                    epoch=1,
                    decode_us=10 if member.peer == self.prefer else 1_000_000,
                ),
            )
            for member in self.members
            if (span := member.span) is not None
        }

    async def chain(self, *cuts: int) -> Member:
        """A node for each span between the cuts, and one that serves nothing and asks."""
        for first, last in zip((0, *cuts), (*cuts, LAYERS), strict=True):
            await self.start(first, last)
        return await self.start()

    async def change(self) -> None:
        """Wait until some engine has freed a session."""
        await self._change.wait()

    async def freed(self) -> None:
        """Wait until no running member knows of any session any more; an engine is the last that hears of the end."""
        with trio.fail_after(30):
            while any(
                member.load.sessions
                or member.origin.running
                or (member.served is not None and (member.served.sessions or member.local.open_sessions))
                for member in self.members
                if member.peer in self.network.hosts
            ):
                await self._change.wait()

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()


@asynccontextmanager
async def open_mesh() -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        yield Mesh(nursery)
        nursery.cancel_scope.cancel()


def alone(
    prompt: Sequence[int] = PROMPT,
    *,
    most: int = 12,
    sampling: Sampling = GREEDY,
    adapter: AdapterSpec | None = None,
) -> list[int]:
    """The answer of one process that holds the whole model, with an adapter whose files are here."""
    sessions = LocalEngine(0, LAYERS)._sessions
    text = np.asarray(prompt, np.int32)
    if adapter is not None:
        sessions.adapters.announce(adapt_request(adapter))
        for layer, path in adapter.layers.items():
            sessions.adapters.fill(adapter.name, layer, path.read_bytes())
    sessions.open(
        b"s",
        first=0,
        last=LAYERS,
        capacity=SHAPE.context,
        sampling=sampling,
        prompt=text,
        adapter="" if adapter is None else adapter.name,
    )
    out: list[int] = []
    rows, position = text, 0
    while len(out) < most and (not out or out[-1] not in SHAPE.eos_ids):
        token = sessions.step(
            b"s", position=position, rows=len(rows), body=rows.tobytes(), sample_after=True, prefill=not out
        ).token
        assert token is not None
        position += len(rows)
        out.append(token)
        rows = np.asarray([token], np.int32)
    return out
