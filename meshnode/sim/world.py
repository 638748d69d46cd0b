"""N real nodes on a network in memory, in virtual time: start, crash, restart, part, heal, ask.

    async with World.open(seed=1) as world:
        world.add(5, memory="400kB")
        await world.start_all()
        await world.publish("n1", ModelSpec(layers=24))
        await world.until(world.all_ready)

Only the edges are simulated: `sim/network.py`, `state/memory_state.py`, `engine/local.py`. The stores are real,
in a temporary folder, and are used without threads. Time is trio's: under a MockClock an hour takes as long as what
happens in it.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
import trio
from nacl.signing import SigningKey

from meshnode.config.settings import Config, ContentSection, NetworkSection, ReleaseSection, ServeSection
from meshnode.config.values import Amount
from meshnode.core.clock import VirtualWall, monotonic
from meshnode.core.health import Health
from meshnode.core.paths import Paths
from meshnode.core.sizes import parse_size
from meshnode.core.tracing import NoTracer, Tracer
from meshnode.core.workers import InLoop
from meshnode.engine.local import LocalEngine
from meshnode.engine.port import StageSpec
from meshnode.membership.identity import Identity
from meshnode.membership.port import Membership
from meshnode.node import Node
from meshnode.parts import Machine, Parts
from meshnode.policy.idle import DeviceFacts
from meshnode.services.inference.text import Text
from meshnode.services.upstream import Server
from meshnode.sim.model import ModelSpec, ToyModel, make_model
from meshnode.sim.network import MemoryNetwork
from meshnode.state.audit import NoAudit
from meshnode.state.memory_state import MemoryState
from meshnode.state.samples import Samples
from meshnode.state.samples_port import Limits
from meshnode.store.blob_store import BlobStore
from meshnode.text.in_process import open_in_process
from meshnode.text.question import Question
from meshnode.trainer.port import Trainer
from protocols.ids import DAG_CBOR, Cid, PeerId
from protocols.membership import ROLES, Network, network_id, sign_network
from protocols.membership.messages import Certificate
from protocols.membership.trust import sign_certificate
from protocols.words import layers

IN_MEMORY: Final = Path("/dev/shm")  # where Linux keeps files that never reach a disk
LOOK_S: Final = 0.05  # between two looks at a condition, virtual seconds
BORN_MS: Final = 1_700_000_000_000
QUOTA_BYTES: Final = 1 << 30


@dataclass(eq=False)
class Device:
    """One device: what stays when its node is down, and the node while it runs."""

    name: str
    identity: Identity
    membership: Membership
    memory: str  # serve.memory
    content: ContentSection
    folder: Path  # of its store
    state: MemoryState
    samples: Samples
    layers: int = 0  # serve.layers
    layer_s: float = 0.0  # of one step through one layer; 0: every step takes `World.engine_step_s`
    broken: str = ""  # why its engines don't start
    trainer: Trainer | None = None  # set before it starts, to have it learn
    engines: list[LocalEngine] = field(default_factory=list)  # of the present run
    tracer: Tracer = NoTracer()  # set before it starts, to keep its spans
    facts: DeviceFacts = DeviceFacts()  # what its system tells
    upstream: Server | None = None  # of its owner's own
    offered: tuple[str, ...] = ()  # models of that
    copied: bool = False  # somebody has copied another device's data folder
    node: Node | None = None
    store: BlobStore | None = None  # while the node runs
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def running(self) -> Node:
        """Its node. Raises AssertionError while it is down."""
        assert self.node is not None, f"{self.name} does not run"
        return self.node


class World:
    """All devices, the network between them, and its founder."""

    def __init__(self, seed: int, folder: Path, nursery: trio.Nursery) -> None:
        self._folder = folder
        self.rng = random.Random(seed)
        self.network = MemoryNetwork(random.Random(self.rng.getrandbits(64)))
        self.wall = VirtualWall(BORN_MS)
        self.devices: dict[str, Device] = {}
        self.engine_step_s = 0.001
        self.engine_load_s = 0.1
        self.one_lan = False  # all are on one local network, where members are looked for
        self.release = ReleaseSection()  # of every node that starts
        self.seeds = 2  # devices that everybody has as bootstrap peers
        self._nursery = nursery
        self._founder = SigningKey(self.rng.randbytes(32))
        self._description = Network(
            name="simulated",
            nonce=self.rng.randbytes(16),
            founders=(bytes(self._founder.verify_key),),
            created_ms=BORN_MS,
        )
        self._secret = self.rng.randbytes(32)

    @classmethod
    @asynccontextmanager
    async def open(cls, seed: int) -> AsyncIterator[World]:
        """A new world; every node is gone when the block ends. Raises whatever ends a node."""
        with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
            async with trio.open_nursery() as nursery:
                world = cls(seed, Path(folder), nursery)
                yield world
                nursery.cancel_scope.cancel()
            for device in world.devices.values():
                device.samples.close()

    # ------------------------------------------------------------ devices

    def add(
        self,
        count: int = 1,
        *,
        memory: str = "1MB",
        roles: tuple[str, ...] = ROLES,
        by: str = "",
        content: ContentSection = ContentSection(),
        layers: int = 0,
        layer_s: float = 0.0,
    ) -> list[Device]:
        """New devices n1, n2, ...: members already, with the first ones as their bootstrap peers.

        Args:
          by: the device that has invited them; empty: the founder's key itself, so that they are founder's devices.
          layers: most layers to hold; 0: as many as the memory takes.
          layer_s: seconds of one step through one layer; 0: every step takes as long.
        """
        added = []
        for _ in range(count):
            name = f"n{len(self.devices) + 1}"
            identity = Identity(self.rng.randbytes(32))
            certificate = Certificate(
                network=network_id(self._description),
                peer=identity.peer_id,
                roles=roles,
                issued_ms=BORN_MS,
                expires_ms=0,
                serial=len(self.devices) + 1,
            )
            membership = Membership(
                network_record=sign_network(self._founder, self._description),
                secret=self._secret,
                chain=(
                    (*self[by].membership.chain, sign_certificate(self[by].identity.signing_key, certificate))
                    if by
                    else (sign_certificate(self._founder, certificate),)
                ),
                name=name,
            )
            device = Device(
                name,
                identity,
                membership,
                memory,
                content,
                self._folder / name,
                MemoryState(),
                no_samples(),
                layers,
                layer_s,
            )
            self.devices[name] = device
            added.append(device)
        return added

    def copy(self, name: str) -> Device:
        """A further device with the data folder of another one as it is now, but its files."""
        whole = self.devices[name]
        copied = f"{name}-copy"
        self.devices[copied] = Device(
            copied,
            whole.identity,
            whole.membership,
            whole.memory,
            whole.content,
            self._folder / copied,
            deepcopy(whole.state),
            no_samples(),
            copied=True,
        )
        return self.devices[copied]

    def __getitem__(self, name: str) -> Device:
        return self.devices[name]

    @property
    def up(self) -> list[Device]:
        """Devices whose node runs."""
        return [device for device in self.devices.values() if device.node is not None]

    async def start(self, *names: str) -> None:
        """Start (again) what is down, one after the other; each runs when this returns."""
        for name in names:
            device = self.devices[name]
            assert device.node is None, f"{name} runs already"
            device.scope, device.ended = trio.CancelScope(), trio.Event()
            await self._nursery.start(self._live, device)

    async def start_all(self) -> None:
        await self.start(*(name for name, device in self.devices.items() if device.node is None))

    async def _live(self, device: Device, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        structlog.contextvars.bind_contextvars(node=device.name)
        device.store = BlobStore(device.folder, QUOTA_BYTES, wall=self.wall)
        device.node = Node(self._parts(device, device.store), self._config(device))
        try:
            with device.scope:
                await device.node.run(task_status=task_status)
        finally:
            device.store.close()
            device.node = device.store = None
            device.ended.set()

    async def crash(self, *names: str) -> None:
        """End nodes at once, as a power cut does. Their stores and states stay."""
        for name in names:
            if not self.devices[name].copied:
                self.network.kill(self.devices[name].peer_id)
            self.devices[name].scope.cancel()
        for name in names:
            await self.devices[name].ended.wait()

    async def leave(self, name: str) -> None:
        """Stop a node gracefully: it hands its layers over first."""
        device = self.devices[name]
        device.running.stopping.set()
        await device.ended.wait()

    def split(self, one: Iterable[str], other: Iterable[str]) -> None:
        """Cut every link between two groups of devices; `network.heal()` joins them again."""
        self.network.partition([self[name].peer_id for name in one], [self[name].peer_id for name in other])

    def unplug(self) -> None:
        """Every link between devices is dead, as with a switch without power; `network.heal()` brings it back."""
        peers = [device.peer_id for device in self.devices.values()]
        self.network.unplug(peers, peers)

    def _parts(self, device: Device, store: BlobStore) -> Parts:
        device.engines.clear()

        def engine(spec: StageSpec) -> LocalEngine:
            step_s = device.layer_s * (spec.last - spec.first) or self.engine_step_s
            made = LocalEngine(spec, load_s=self.engine_load_s, step_s=step_s)
            device.engines.append(made)
            if device.broken:
                made.lose(device.broken)
            return made

        return Parts(
            identity=device.identity,
            membership=device.membership,
            host=self.network.twin(device.peer_id) if device.copied else self.network.host(device.peer_id),
            local_network=self.network.local(device.peer_id) if self.one_lan else None,
            store=store,
            state=device.state,
            samples=device.samples,
            trainer=device.trainer,
            private=None,
            activity=DeviceFacts,
            device=lambda: device.facts,
            learned=device.folder / "learned",
            engine=engine,
            tokenizer=open_in_process,
            upstream=device.upstream,
            audit=NoAudit(),
            sources=(),
            daemon=None,
            machine=Machine(name=device.name, free_memory_bytes=1 << 30, tags=("cpu",)),
            health=Health(monotonic),
            wall=self.wall,
            rng=random.Random(self.rng.getrandbits(64)),
            workers=InLoop(),
            tracer=device.tracer,
        )

    def _config(self, device: Device) -> Config:
        others = [other for other in self.devices.values() if other is not device][: self.seeds]
        return Config(
            paths=Paths(Path("/nowhere") / device.name),
            network=NetworkSection(
                bootstrap=tuple(self.network.host(other.peer_id).addresses[0] for other in others)
            ),
            serve=ServeSection(
                memory=Amount(size_bytes=parse_size(device.memory)),
                layers=device.layers,
                engine="null",
                upstream_models=device.offered,
            ),
            content=device.content,
            release=self.release,
        )

    # ------------------------------------------------------------ what people do

    async def publish(self, name: str, spec: ModelSpec = ModelSpec()) -> Cid:
        """Put a model into one device's store and have the network serve it."""
        device = self.devices[name]
        assert device.store is not None, f"{name} does not run"
        model = make_model(spec, device.identity.signing_key, self.wall())
        cid = give(device.store, model, device.folder)
        device.running.releases.announce(cid, "")
        return cid

    async def ask(self, name: str, prompt: tuple[int, ...] = (5, 6, 7), *, max_tokens: int = 12) -> list[int]:
        """The answer tokens that one node gets to a prompt. Raises Declined, PeerUnreachable."""
        question = Question(token_ids=prompt, max_tokens=max_tokens, temperature=0)
        tokens = []
        async with aclosing(self.devices[name].running.text.answer(question)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Text) and piece.token >= 0:
                    tokens.append(piece.token)
        return tokens

    # ------------------------------------------------------------ what can be waited for

    async def until(self, condition: Callable[[], bool], *, within_s: float = 120.0) -> float:
        """Wait until a condition holds; the virtual seconds that it took.

        Raises trio.TooSlowError with the state of every node.
        """
        began = trio.current_time()
        while not condition():
            if trio.current_time() - began > within_s:
                raise trio.TooSlowError(f"not within {within_s:.0f} s:\n{self.describe()}")
            await trio.sleep(LOOK_S)
        return trio.current_time() - began

    def all_ready(self) -> bool:
        """A probe token has passed through the chain of every node that runs."""
        return all(device.running.readiness.now.ready for device in self.up)

    def connected(self) -> bool:
        """Every node that runs sees the advert of every other one."""
        peers = {device.peer_id for device in self.up}
        return all(peers <= device.running.directory.live().keys() for device in self.up)

    def joined(self) -> bool:
        """Every node that runs has a connection to every other one."""
        peers = {device.peer_id for device in self.up}
        return all(set(device.running.host.peers) == peers - {device.peer_id} for device in self.up)

    def describe(self) -> str:
        """One line per device, for people."""
        lines = []
        for device in self.devices.values():
            if device.node is None:
                lines.append(f"{device.name}: down")
                continue
            span = device.node.spans.serving
            holds = "idle" if span is None else layers(span.span.first, span.span.last)
            lines.append(f"{device.name}: {holds}; {device.node.readiness.now.sentence}")
        return "\n".join(lines)


def no_samples() -> Samples:
    """Room for samples, in memory and in the clear."""
    return Samples(None, Limits(samples=10_000, size_bytes=1 << 24), lambda: b"")


def give(store: BlobStore, model: ToyModel, folder: Path) -> Cid:
    """Put every file of a model, and its manifest, into a store; the CID of the manifest."""
    cid = store.put_block(model.block, DAG_CBOR)
    store.pin(cid, cid)
    for data in model.files:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(data)
            file.flush()
            store.add_file(Path(file.name), pin=cid)
    return cid
