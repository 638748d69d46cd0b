"""The content service and sources outside the mesh: asked for what no peer gives, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.content.blob_store import BlobStore
from meshnode.content.gateway import Gateway
from meshnode.content.ipfs_api import IpfsApi
from meshnode.content.outside import Outside
from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.services import content
from meshnode.services.content import ContentService
from protocols.ids import DAG_CBOR, Cid
from protocols.unixfs.builder import file_cid
from tests.http_server import Request, Scene, site
from tests.services.test_content import ME, MIB, QUOTA, A, Network, network, noise


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "OUTSIDE_SECONDS", 0.2)
    monkeypatch.setattr(content, "OFFER_SECONDS", 0.05)


class World:
    """Blocks that only the world outside has, over the paths of a gateway and of a daemon."""

    def __init__(self, folder: Path, *files: bytes) -> None:
        self.store = BlobStore(folder / "world", QUOTA)
        for number, data in enumerate(files):
            source = folder / f"world-{number}"
            source.write_bytes(data)
            self.store.add_file(source, pin="test")
        self.given = 0

    def gateway(self, request: Request) -> None:
        self._give(request, Cid(request.path.removeprefix("/ipfs/").partition("?")[0]))

    def daemon(self, request: Request) -> None:
        if "/version" in request.path:
            request.reply(b'{"Version":"0.22.0"}')
        else:
            self._give(request, Cid(request.path.partition("arg=")[2].partition("&")[0]))

    def _give(self, request: Request, cid: Cid) -> None:
        block = self.store.block(cid)
        if block is None:
            request.reply(b'{"Message":"request timed out"}', 500 if request.command == "POST" else 404)
        else:
            self.given += 1
            request.reply(block)


async def reader(net: Network, outside: Outside, *providers: str, patience: float = 10) -> ContentService:
    """A node without a file of its own."""
    store = BlobStore(net.folder / "reader", QUOTA)
    service = ContentService(
        net.host(ME),  # type: ignore[arg-type]
        store,
        lambda _: providers,  # type: ignore[arg-type, return-value]
        patience=patience,
        outside=outside.block,
    )
    await net.nursery.start(service.run)
    return service


async def test_a_file_that_no_peer_has_comes_from_a_gateway(tmp_path: Path) -> None:
    data = noise(9 * MIB + 5)
    world = World(tmp_path, data)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Outside([gateway]))
            path = await me.fetch(file_cid(data), len(data))
            assert path.read_bytes() == data
    assert world.given == 11  # ten leaves and the root, each once


async def test_a_block_that_no_peer_has_comes_from_the_daemon(tmp_path: Path) -> None:
    world = World(tmp_path)
    manifest = b"\xa1" + noise(3000)
    cid = world.store.put_block(manifest, DAG_CBOR)
    with site(world.daemon) as here:
        async with network(tmp_path) as net:
            daemon = IpfsApi(here.multiaddr, Health())
            await net.nursery.start(daemon.run)
            me = await reader(net, Outside([daemon]))
            assert await me.fetch_block(cid) == manifest


async def test_what_a_peer_gives_is_not_asked_outside(tmp_path: Path) -> None:
    data = noise(9 * MIB)
    world = World(tmp_path, data)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            await net.node(A, data)
            me = await reader(net, Outside([gateway]), A)
            assert (await me.fetch(file_cid(data), len(data))).read_bytes() == data
    assert here.paths == []


async def test_the_rest_comes_from_outside_when_the_peer_dies(tmp_path: Path) -> None:
    data = noise(20 * MIB)
    world = World(tmp_path, data)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            _, _, host = await net.node(A, data)
            host.rate = 40 * MIB
            me = await reader(net, Outside([gateway]), A)

            def watch(done: int, size: int) -> None:
                if done >= size * 0.4 and A in net.hosts:
                    net.kill(A)

            assert (await me.fetch(file_cid(data), len(data), progress=watch)).read_bytes() == data
    assert 0 < world.given <= 13
    assert me.fetched_from[A] >= 8 * MIB


async def test_a_lying_gateway_spoils_nothing_and_is_named(tmp_path: Path) -> None:
    data = noise(5 * MIB)
    world = World(tmp_path, data)
    health = Health()
    with site(lambda request: request.reply(b"nonsense")) as liar, site(world.gateway) as honest:
        async with network(tmp_path) as net:
            gateways = [Gateway(liar.url, health), Gateway(honest.url, health)]
            for gateway in gateways:
                await net.nursery.start(gateway.run)
            me = await reader(net, Outside(gateways))
            assert (await me.fetch(file_cid(data), len(data))).read_bytes() == data
    assert len(liar.paths) == 1
    assert [shown.code for shown in health.current()] == ["gateway-lied"]


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
            me = await reader(net, Outside([gateway]), patience=1)
            data = noise(2 * MIB)
            with pytest.raises(ContentUnavailable, match=word) as caught:
                await me.fetch(file_cid(data), len(data))
            assert caught.value.cid == file_cid(data)


async def test_two_fetches_share_what_comes_from_outside_and_one_may_end(tmp_path: Path) -> None:
    common, rest = noise(3 * MIB, 1), noise(2 * MIB, 2)
    files = [common + rest, common + noise(MIB, 3)]
    world = World(tmp_path, *files)
    with site(world.gateway) as here:
        async with network(tmp_path) as net:
            gateway = Gateway(here.url, Health())
            await net.nursery.start(gateway.run)
            me = await reader(net, Outside([gateway]))
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def short_lived() -> None:
                    with scope:
                        await me.fetch(file_cid(files[0]), len(files[0]), progress=lambda *_: scope.cancel())

                nursery.start_soon(short_lived)
                path = await me.fetch(file_cid(files[1]), len(files[1]))
            assert path.read_bytes() == files[1]
