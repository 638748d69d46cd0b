"""The content service and sources outside the mesh: asked for what no peer gives, and for nothing else."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.ipfs import gateway as gateway_module
from meshnode.ipfs.fallback import Fallback
from meshnode.ipfs.gateway import Gateway
from meshnode.ipfs.rpc import IpfsApi
from meshnode.services.content import outside as search
from meshnode.services.content import patience
from meshnode.services.content.service import ContentService
from meshnode.store.blob_store import BlobStore
from protocols.car.messages import Block, Header, encode_block, encode_header
from protocols.ids import DAG_CBOR, DAG_PB, Cid, PeerId, cid_from_bytes, cid_to_bytes
from protocols.unixfs import node
from protocols.unixfs.builder import file_cid
from tests.http_server import Request, Scene, drip, flood, silence, site
from tests.refs import ref
from tests.services.test_content import ME, MIB, QUOTA, A, Network, network, noise

CAR = "application/vnd.ipld.car; version=1; order=dfs; dups=n"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "OUTSIDE_S", 0.2)
    monkeypatch.setattr(patience, "OFFER_S", 0.05)
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


async def reader(
    net: Network, outside: Fallback, providers: Sequence[PeerId] = (), patience: float = 10
) -> ContentService:
    """A node without a file of its own."""
    store = BlobStore(net.folder / "reader", QUOTA)
    host = net.host(ME)
    service = content_of(host, store, Known(host, providers), patience_s=patience, outside=outside)
    await net.join(host)
    await net.nursery.start(service.run)
    return service


async def test_a_file_that_no_peer_has_comes_from_a_gateway(tmp_path: Path) -> None:
    data = noise(9 * MIB + 5)
    world = World(tmp_path, data)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Fallback([gateway]))
            opened = await me.open(ref(file_cid(data), len(data)))
            assert opened.path.read_bytes() == data
    assert (world.cars, world.given) == (1, 0)


async def test_a_gateway_without_car_files_gives_the_blocks(tmp_path: Path) -> None:
    data = noise(9 * MIB + 5), noise(8 * MIB, 1)
    world = World(tmp_path, *data)
    with site(world.blocks_only) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Fallback([gateway]))
            for part in data:
                assert (await me.open(ref(file_cid(part), len(part)))).path.read_bytes() == part
    assert sum("format=car" in path for path in here.paths) == 1
    assert world.given == 11 + 9  # leaves and roots, each once


async def test_a_small_file_and_the_rest_of_a_large_one_come_block_by_block(tmp_path: Path) -> None:
    small, large = noise(2 * MIB), noise(48 * MIB, 1)
    world = World(tmp_path, small, large)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Fallback([gateway]))
            assert (await me.open(ref(file_cid(small), len(small)))).path.read_bytes() == small
            assert world.cars == 0
            with trio.CancelScope() as scope:

                def watch(done: int, size: int) -> None:
                    if done >= 0.3 * size:
                        scope.cancel()

                await me.fetch(ref(file_cid(large), len(large)), progress=watch)
            assert scope.cancelled_caught
            assert world.cars == 1
            assert (await me.open(ref(file_cid(large), len(large)))).path.read_bytes() == large
    assert world.cars == 1
    assert 3 < world.given < 40


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_car_that_is_not_what_it_should_be_costs_nothing_but_time(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file comes whole from the blocks, of the same gateway unless it sent wrong bytes."""
    monkeypatch.setattr(gateway_module, "BEGIN_S", 1.0)
    data = noise(9 * MIB + 5)
    world = World(tmp_path, data, noise(MIB, 7))
    health = Health()

    def scene(request: Request) -> None:
        if "format=car" in request.path and not world.cars:
            world.cars += 1
            TROUBLES[trouble](world, request, file_cid(data))
        else:
            world.gateway(request)

    with site(scene) as bad, site(world.blocks_only) as good:
        async with network(tmp_path) as net:
            gateways = [Gateway(bad.url, health, seconds=1.0), Gateway(good.url, health)]
            for gateway in gateways:
                await net.nursery.start(gateway.run)
            outside = Fallback(gateways)
            me = await reader(net, outside)
            tracemalloc.start()
            try:
                assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    assert peak < 64 * MIB  # the server of this test included
    assert me.fetched_from == {}
    forged = trouble == "a forged block"
    assert (bad.url in outside.names) is not forged
    assert [shown.code for shown in health.current()] == ["bad-gateway"] * forged


async def test_a_peer_that_comes_ends_the_car(tmp_path: Path) -> None:
    data = noise(24 * MIB)
    world = World(tmp_path, data)
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

    with site(scene) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            providers: list[PeerId] = []
            me = await reader(net, Fallback([gateway]), providers)
            async with trio.open_nursery() as nursery:

                async def appear() -> None:
                    await came.wait()
                    await net.node(A, data)
                    providers.append(A)

                nursery.start_soon(appear)
                with trio.fail_after(20):
                    assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    assert me.fetched_from[A] > 12 * MIB
    assert world.given == 0


async def test_the_daemon_exports_a_file_in_one_go(tmp_path: Path) -> None:
    data = noise(9 * MIB + 5)
    world = World(tmp_path, data)
    health = Health()
    with site(world.daemon) as here:
        async with network(tmp_path) as net:
            daemon = IpfsApi(here.multiaddr, health)
            await net.nursery.start(daemon.run)
            me = await reader(net, Fallback([daemon]))
            assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    assert (world.cars, world.given) == (1, 0)
    assert health.current() == []


async def test_a_daemon_that_can_not_export_gives_the_blocks(tmp_path: Path) -> None:
    data = noise(9 * MIB + 5)
    world = World(tmp_path, data)
    health = Health()

    def scene(request: Request) -> None:
        if "/dag/export" in request.path:
            request.reply(b'{"Message":"command not found","Code":0,"Type":"error"}', 404)
        else:
            world.daemon(request)

    with site(scene) as here:
        async with network(tmp_path) as net:
            daemon = IpfsApi(here.multiaddr, health)
            await net.nursery.start(daemon.run)
            me = await reader(net, Fallback([daemon]))
            assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    assert (world.cars, world.given) == (0, 11)
    assert health.current() == []


async def test_a_block_that_no_peer_has_comes_from_the_daemon(tmp_path: Path) -> None:
    world = World(tmp_path)
    manifest = b"\xa1" + noise(3000)
    cid = world.store.put_block(manifest, DAG_CBOR)
    with site(world.daemon) as here:
        async with network(tmp_path) as net:
            daemon = IpfsApi(here.multiaddr, Health())
            await net.nursery.start(daemon.run)
            me = await reader(net, Fallback([daemon]))
            assert await me.block(cid) == manifest


async def test_what_a_peer_gives_is_not_asked_outside(tmp_path: Path) -> None:
    data = noise(9 * MIB)
    world = World(tmp_path, data)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            await net.node(A, data)
            me = await reader(net, Fallback([gateway]), (A,))
            assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    assert here.paths == []


async def test_where_nobody_else_could_have_it_the_outside_is_asked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Yet not by a node that has just started and knows nobody, nor while a member is said to have it."""
    data = noise(9 * MIB), noise(MIB, 1)
    world = World(tmp_path, *data)
    monkeypatch.setattr(patience, "OUTSIDE_S", 1e6)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Fallback([gateway]))
            with trio.move_on_after(0.5) as limit:
                await me.fetch(ref(file_cid(data[1]), len(data[1])))
            assert limit.cancelled_caught and not here.paths
            monkeypatch.setattr(patience, "ACQUAINTED_S", 0.0)
            for part in data:
                assert (await me.open(ref(file_cid(part), len(part)))).path.read_bytes() == part


async def test_the_rest_comes_from_outside_when_the_peer_dies(tmp_path: Path) -> None:
    data = noise(20 * MIB)
    world = World(tmp_path, data)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            await net.node(A, data)
            net.slow(A, 40 * MIB)
            me = await reader(net, Fallback([gateway]), (A,))

            def watch(done: int, size: int) -> None:
                if done >= size * 0.4 and A in net.hosts:
                    net.kill(A)

            assert (await me.open(ref(file_cid(data), len(data)), progress=watch)).path.read_bytes() == data
    assert 0 < world.given <= 13
    assert me.fetched_from[A] >= 8 * MIB


async def test_a_corrupt_gateway_spoils_nothing_and_is_named(tmp_path: Path) -> None:
    data = noise(5 * MIB)
    world = World(tmp_path, data)
    health = Health()
    with site(lambda request: request.reply(b"nonsense")) as hostile, site(world.blocks_only) as honest:
        async with network(tmp_path) as net:
            gateways = [Gateway(hostile.url, health), Gateway(honest.url, health)]
            for gateway in gateways:
                await net.nursery.start(gateway.run)
            me = await reader(net, Fallback(gateways))
            assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    assert len(hostile.paths) == 2  # for a CAR file, which is not bad data, and for a block
    assert [shown.code for shown in health.current()] == ["bad-gateway"]


@pytest.mark.parametrize(
    ("scene", "word"),
    [
        (lambda request: request.reply(b"", 404), "does not have it"),
        (lambda request: request.reply(b"", 500), "HTTP 500|failed a moment ago"),
        (lambda request: request.reply(b"nonsense"), "not the block|no source is left"),
    ],
)
async def test_when_nobody_has_it_the_error_says_what_the_sources_said(
    tmp_path: Path, scene: Scene, word: str
) -> None:
    with site(scene) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Fallback([gateway]), patience=1)
            data = noise(2 * MIB)
            with pytest.raises(ContentUnavailable, match=word) as caught:
                await me.fetch(ref(file_cid(data), len(data)))
            assert caught.value.cid == file_cid(data)
            assert "ask again; what" in str(caught.value)


async def test_the_error_names_every_source_and_why_it_gave_nothing(tmp_path: Path) -> None:
    """One sends nonsense, one fails, one never answers, and so the last one was not asked."""
    cid = file_cid(b"nobody has this")
    with (
        site(lambda request: request.reply(b"nonsense")) as hostile,
        site(lambda request: request.reply(b"", 500)) as broken,
        site(silence) as silent,
        site(lambda request: request.reply(b"", 404)) as empty,
    ):
        async with network(tmp_path) as net:
            gateways = [Gateway(here.url, Health()) for here in (hostile, broken, silent, empty)]
            for gateway in gateways:
                await net.nursery.start(gateway.run)
            me = await reader(net, Fallback(gateways), patience=2)
            for said in ("gave 8 bytes that are not the block", "so it is not asked again"):
                with pytest.raises(ContentUnavailable) as caught:
                    await me.block(cid)
                text = str(caught.value)
                assert f"{hostile.url} gave" in text and said in text
                assert f"{broken.url}" in text and "HTTP 500" in text
                assert f"{silent.url} has not answered yet" in text
                assert f"{empty.url} was not asked yet" in text


async def test_two_fetches_share_what_comes_from_outside_and_one_may_end(tmp_path: Path) -> None:
    common, rest = noise(3 * MIB, 1), noise(2 * MIB, 2)
    files = [common + rest, common + noise(MIB, 3)]
    world = World(tmp_path, *files)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Fallback([gateway]))
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def short_lived() -> None:
                    with scope:
                        await me.fetch(ref(file_cid(files[0]), len(files[0])), progress=lambda *_: scope.cancel())

                nursery.start_soon(short_lived)
                opened = await me.open(ref(file_cid(files[1]), len(files[1])))
            assert opened.path.read_bytes() == files[1]
