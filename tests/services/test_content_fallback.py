"""The content service and sources outside the mesh: asked for what no peer gives, and for nothing else."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.ipfs import gateway as gateway_module
from meshnode.ipfs.gateway import Gateway
from meshnode.ipfs.rpc import IpfsApi
from meshnode.ipfs.source_order import Fallback
from meshnode.services.content import escalation as search_patience
from meshnode.services.content import outside as search
from meshnode.services.content.service import ContentService
from meshnode.services.port import Progress
from meshnode.store.blob_store import BlobStore
from protocols.car.messages import Block, Header, encode_block, encode_header
from protocols.ids import DAG_CBOR, DAG_PB, Cid, PeerId, cid_from_bytes, cid_to_bytes
from protocols.unixfs import node
from protocols.unixfs.builder import file_cid
from tests.http_server import Request, Scene, Site, drip, flood, silence, site
from tests.refs import ref
from tests.services.test_content import ME, MIB, QUOTA, A, Network, network, noise

CAR = "application/vnd.ipld.car; version=1; order=dfs; dups=n"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_patience, "OUTSIDE_S", 0.2)
    monkeypatch.setattr(search_patience, "OFFER_S", 0.05)
    monkeypatch.setattr(search, "PAUSE_S", 0.05)


class World:
    """Blocks that only the world outside has, over the paths of a gateway and of a daemon."""

    def __init__(self, folder: Path, *files: bytes) -> None:
        self.store = BlobStore(folder / "world", QUOTA)
        for number, data in enumerate(files):
            source = folder / f"world-{number}"
            source.write_bytes(data)
            self.store.add_file(source, pin="test")
        self.given = 0  # single blocks
        self.cars = 0

    def gateway(self, request: Request) -> None:
        """As specs.ipfs.tech/http-gateways/trustless-gateway has it."""
        cid = Cid(request.path.removeprefix("/ipfs/").partition("?")[0])
        if "format=car" not in request.path:
            self._give(request, cid)
            return
        assert request.headers["Accept"] == "application/vnd.ipld.car; version=1; order=dfs; dups=n"
        self.send_car(request, self.car(cid))

    def blocks_only(self, request: Request) -> None:
        """A gateway that has not heard of CAR files and sends the file itself, as js-ipfs does."""
        if "format=car" in request.path:
            request.reply(b"the whole file", Content_Type="application/octet-stream")
        else:
            self.gateway(request)

    def daemon(self, request: Request) -> None:
        cid = Cid(request.path.partition("arg=")[2].partition("&")[0])
        if "/version" in request.path:
            request.reply(b'{"Version":"0.22.0"}')
        elif "/dag/export" in request.path:
            self.send_car(request, self.car(cid))
        else:
            self._give(request, cid)

    def bare_daemon(self, request: Request) -> None:
        """A daemon that has not heard of CAR files."""
        if "/dag/export" in request.path:
            request.reply(b'{"Message":"command not found","Code":0,"Type":"error"}', 404)
        else:
            self.daemon(request)

    def car(self, root: Cid) -> Iterator[bytes]:
        """Header, then the blocks depth first, each once; piece by piece."""
        yield encode_header(Header((cid_to_bytes(root),)))
        seen: set[bytes] = set()
        due = [cid_to_bytes(root)]
        while due:
            cid = due.pop()
            block = self.store.block(cid_from_bytes(cid))
            if block is None:
                return
            if cid not in seen:
                seen.add(cid)
                yield encode_block(Block(cid, block))
            if cid[1] == DAG_PB:
                due += [link.cid for link in reversed(node.decode(block).links)]

    def send_car(self, request: Request, pieces: Iterator[bytes], kind: str = CAR) -> None:
        self.cars += 1
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.end_headers()
        for piece in pieces:
            request.wfile.write(piece)
        request.close_connection = True

    def _give(self, request: Request, cid: Cid) -> None:
        block = self.store.block(cid)
        if block is None:
            request.reply(b'{"Message":"request timed out"}', 500 if request.command == "POST" else 404)
        else:
            self.given += 1
            request.reply(block)


def _forged(world: World, request: Request, root: Cid) -> None:
    def pieces() -> Iterator[bytes]:
        for number, piece in enumerate(world.car(root)):
            yield piece if number != 4 else piece[:-1] + bytes([piece[-1] ^ 1])

    world.send_car(request, pieces())


def _foreign(world: World, request: Request, root: Cid) -> None:
    world.send_car(request, itertools.chain(itertools.islice(world.car(root), 4), world.car(file_cid(noise(MIB, 7)))))


def _foreign_block(world: World, request: Request, root: Cid) -> None:
    other = itertools.islice(world.car(file_cid(noise(MIB, 7))), 1, None)
    world.send_car(request, itertools.chain(itertools.islice(world.car(root), 4), other))


def _endless(world: World, request: Request, root: Cid) -> None:
    """The same good block again and again."""
    header, first, second = itertools.islice(world.car(root), 3)
    world.send_car(request, itertools.chain((header, first), itertools.repeat(second)))


def _cut(world: World, request: Request, root: Cid) -> None:
    world.send_car(
        request, (piece[: 1000 if number == 5 else None] for number, piece in enumerate(_some(world, root)))
    )


def _some(world: World, root: Cid) -> Iterator[bytes]:
    return itertools.islice(world.car(root), 6)


def _slow(world: World, request: Request, root: Cid) -> None:
    """Never silent for long, never done with a block."""

    def pieces() -> Iterator[bytes]:
        yield from itertools.islice(world.car(root), 3)
        for byte in next(itertools.islice(world.car(root), 3, None)):
            if request.ended.wait(0.05):
                return
            yield bytes([byte])

    world.send_car(request, pieces())


TROUBLES: dict[str, Callable[[World, Request, Cid], None]] = {
    "a forged block": _forged,
    "another CAR behind it": _foreign,
    "a block of something else": _foreign_block,
    "another root": lambda world, request, _: world.send_car(request, world.car(file_cid(noise(MIB, 7)))),
    "the same block for ever": _endless,
    "cut off in a block": _cut,
    "cut off between blocks": lambda world, request, root: world.send_car(request, _some(world, root)),
    "nothing in it": lambda world, request, _: world.send_car(request, iter(())),
    "a block that drips": _slow,
    "silence": lambda world, request, _: silence(request),
    "dripping": lambda world, request, _: drip(request),
    "a flood": lambda world, request, _: flood(request),
    "a flood that calls itself CAR": lambda world, request, _: world.send_car(
        request, itertools.repeat(bytes(1 << 16))
    ),
    "compressed": lambda world, request, _: request.reply(
        b"\x1f\x8b" * 1000, Content_Encoding="gzip", Content_Type=CAR
    ),
    "another type": lambda world, request, root: world.send_car(request, world.car(root), "text/html"),
    "refused": lambda world, request, _: request.reply(b"", 406),
    "broken": lambda world, request, _: request.reply(b"", 500),
    "not there": lambda world, request, _: request.reply(b"", 404),
    "another host": lambda world, request, _: request.reply(b"", 302, Location="http://localhost:9/ipfs/x"),
}


@dataclass
class Reader:
    """A node without a file of its own, and what it may ask outside its network."""

    content: ContentService
    sites: list[Site]
    outside: Fallback
    health: Health

    async def gets(self, data: bytes, progress: Progress | None = None) -> None:
        """The whole file, as it is."""
        opened = await self.content.open(ref(file_cid(data), len(data)), progress=progress)
        assert opened.path.read_bytes() == data


@asynccontextmanager
async def reading(
    net: Network,
    *scenes: Scene,
    daemons: bool = False,
    providers: Sequence[PeerId] = (),
    patience: float = 10,
    seconds: float = gateway_module.BLOCK_S,
) -> AsyncIterator[Reader]:
    """A running one; each scene is played by a gateway, or by a daemon."""
    health = Health()
    with ExitStack() as stack:
        sites = [stack.enter_context(site(scene)) for scene in scenes]
        sources: list[Gateway | IpfsApi] = []
        for here in sites:
            sources.append(IpfsApi(here.multiaddr, health) if daemons else Gateway(here.url, health, seconds=seconds))
            await net.nursery.start(sources[-1].run)
        outside = Fallback(sources)
        host = net.host(ME)
        store = BlobStore(net.folder / "reader", QUOTA)
        content = content_of(host, store, Known(host, providers), patience_s=patience, outside=outside)
        await net.join(host)
        await net.nursery.start(content.run)
        yield Reader(content, sites, outside, health)


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Network]:
    async with network(tmp_path) as made:
        yield made


@pytest.mark.parametrize("source", ["gateway", "blocks_only", "daemon", "bare_daemon"])
async def test_files_that_no_peer_has_come_in_one_go_or_else_by_their_blocks(net: Network, source: str) -> None:
    """A gateway that sends no CAR file is not asked for one again."""
    data = noise(9 * MIB + 5), noise(8 * MIB, 1)
    world = World(net.folder, *data)
    async with reading(net, getattr(world, source), daemons="daemon" in source) as it:
        for part in data:
            await it.gets(part)
        exports = sum("format=car" in path or "/dag/export" in path for path in it.sites[0].paths)
    cars = 2 if source in ("gateway", "daemon") else 0
    assert world.cars == cars and exports == (1 if source == "blocks_only" else 2)
    assert world.given == (0 if cars else 11 + 9)  # leaves and roots, each once
    assert it.health.current() == []


async def test_a_small_file_and_the_rest_of_a_large_one_come_block_by_block(net: Network) -> None:
    small, large = noise(2 * MIB), noise(48 * MIB, 1)
    world = World(net.folder, small, large)
    async with reading(net, world.gateway) as it:
        await it.gets(small)
        assert world.cars == 0
        with trio.CancelScope() as scope:

            def watch(done: int, size: int) -> None:
                if done >= 0.3 * size:
                    scope.cancel()

            await it.gets(large, watch)
        assert scope.cancelled_caught
        assert world.cars == 1
        await it.gets(large)
    assert world.cars == 1
    assert 3 < world.given < 40


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_car_that_is_not_what_it_should_be_costs_nothing_but_time(
    net: Network, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file comes whole from the blocks, of the same gateway unless it sent wrong bytes."""
    monkeypatch.setattr(gateway_module, "BEGIN_S", 1.0)
    data = noise(9 * MIB + 5)
    world = World(net.folder, data, noise(MIB, 7))

    def scene(request: Request) -> None:
        if "format=car" in request.path and not world.cars:
            world.cars += 1
            TROUBLES[trouble](world, request, file_cid(data))
        else:
            world.gateway(request)

    async with reading(net, scene, world.blocks_only, seconds=1.0) as it:
        tracemalloc.start()
        try:
            await it.gets(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 64 * MIB  # the server of this test included
    assert it.content.fetched_from == {}
    forged = trouble == "a forged block"
    assert (it.sites[0].url in it.outside.names) is not forged
    assert [shown.code for shown in it.health.current()] == ["bad-gateway"] * forged


async def test_a_peer_that_comes_ends_the_car(net: Network) -> None:
    data = noise(24 * MIB)
    world = World(net.folder, data)
    came = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def scene(request: Request) -> None:
        def slowly() -> Iterator[bytes]:
            for number, piece in enumerate(world.car(file_cid(data))):
                if number == 5:
                    token.run_sync_soon(came.set)
                if number > 5 and request.ended.wait(0.3):
                    return
                yield piece

        if "format=car" in request.path:
            world.send_car(request, slowly())
        else:
            world.gateway(request)

    providers: list[PeerId] = []
    async with reading(net, scene, providers=providers) as it, trio.open_nursery() as nursery:

        async def appear() -> None:
            await came.wait()
            await net.node(A, data)
            providers.append(A)

        nursery.start_soon(appear)
        with trio.fail_after(20):
            await it.gets(data)
    assert it.content.fetched_from[A] > 12 * MIB
    assert world.given == 0


async def test_a_block_that_no_peer_has_comes_from_the_daemon(net: Network) -> None:
    world = World(net.folder)
    manifest = b"\xa1" + noise(3000)
    cid = world.store.put_block(manifest, DAG_CBOR)
    async with reading(net, world.daemon, daemons=True) as it:
        assert await it.content.block(cid) == manifest


async def test_what_a_peer_gives_is_not_asked_outside(net: Network) -> None:
    data = noise(9 * MIB)
    world = World(net.folder, data)
    await net.node(A, data)
    async with reading(net, world.gateway, providers=(A,)) as it:
        await it.gets(data)
        assert it.sites[0].paths == []


async def test_where_nobody_else_could_have_it_the_outside_is_asked_at_once(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Yet not by a node that has just started and knows nobody, nor while a member is said to have it."""
    data = noise(9 * MIB), noise(MIB, 1)
    world = World(net.folder, *data)
    monkeypatch.setattr(search_patience, "OUTSIDE_S", 1e6)
    async with reading(net, world.gateway) as it:
        with trio.move_on_after(0.5) as limit:
            await it.gets(data[1])
        assert limit.cancelled_caught and not it.sites[0].paths
        monkeypatch.setattr(search_patience, "ACQUAINTED_S", 0.0)
        for part in data:
            await it.gets(part)


async def test_the_rest_comes_from_outside_when_the_peer_dies(net: Network) -> None:
    data = noise(20 * MIB)
    world = World(net.folder, data)
    await net.node(A, data)
    net.slow(A, 40 * MIB)

    def watch(done: int, size: int) -> None:
        if done >= size * 0.4 and A in net.hosts:
            net.kill(A)

    async with reading(net, world.gateway, providers=(A,)) as it:
        await it.gets(data, watch)
    assert 0 < world.given <= 13
    assert it.content.fetched_from[A] >= 8 * MIB


async def test_a_corrupt_gateway_spoils_nothing_and_is_named(net: Network) -> None:
    data = noise(5 * MIB)
    world = World(net.folder, data)
    async with reading(net, lambda request: request.reply(b"nonsense"), world.blocks_only) as it:
        await it.gets(data)
    assert len(it.sites[0].paths) == 2  # for a CAR file, which is not bad data, and for a block
    assert [shown.code for shown in it.health.current()] == ["bad-gateway"]


@pytest.mark.parametrize(
    ("scene", "word"),
    [
        (lambda request: request.reply(b"", 404), "does not have it"),
        (lambda request: request.reply(b"", 500), "HTTP 500|failed a moment ago"),
        (lambda request: request.reply(b"nonsense"), "not the block|no source is left"),
    ],
)
async def test_when_nobody_has_it_the_error_says_what_the_sources_said(net: Network, scene: Scene, word: str) -> None:
    data = noise(2 * MIB)
    async with reading(net, scene, patience=5) as it:
        with pytest.raises(ContentUnavailable, match=word) as caught:
            await it.gets(data)
    assert caught.value.cid == file_cid(data)
    assert "ask again; what" in str(caught.value)


async def test_the_error_names_every_source_and_why_it_gave_nothing(net: Network) -> None:
    """One sends nonsense, one fails, one never answers, and so the last one was not asked."""
    cid = file_cid(b"nobody has this")
    scenes: list[Scene] = [
        lambda request: request.reply(b"nonsense"),
        lambda request: request.reply(b"", 500),
        silence,
        lambda request: request.reply(b"", 404),
    ]
    async with reading(net, *scenes, patience=5) as it:
        hostile, broken, silent, empty = (here.url for here in it.sites)
        for said in ("gave 8 bytes that are not the block", "so it is not asked again"):
            with pytest.raises(ContentUnavailable) as caught:
                await it.content.block(cid)
            text = str(caught.value)
            assert f"{hostile} gave" in text and said in text
            assert broken in text and "HTTP 500" in text
            assert f"{silent} has not answered yet" in text
            assert f"{empty} was not asked yet" in text


async def test_two_fetches_share_what_comes_from_outside_and_one_may_end(net: Network) -> None:
    common, rest = noise(3 * MIB, 1), noise(2 * MIB, 2)
    files = [common + rest, common + noise(MIB, 3)]
    world = World(net.folder, *files)
    async with reading(net, world.gateway) as it, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def short_lived() -> None:
            with scope:
                await it.gets(files[0], lambda *_: scope.cancel())

        nursery.start_soon(short_lived)
        await it.gets(files[1])
