"""The DHT between real Kubos and real nodes of ours: each side finds what only the other one holds.

Nobody is told where anything is. All they share is one Kubo, which serves the DHT and holds none of the files.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from meshnode.bench.known import Known, content_of
from meshnode.net.libp2p.host import Libp2pHost, open_host
from meshnode.services.content.service import ContentService
from meshnode.services.dht.client import DhtClient, DhtSettings
from meshnode.services.external_peers import ExternalPeers, ExternalSettings
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.messages import PROTOCOL as BITSWAP
from protocols.ids import Cid, cid_of_old
from protocols.unixfs.builder import file_cid
from tests.dht_peer import Network, Shared
from tests.ipfs.world import Kubo, kubo
from tests.process.mesh_rig import (
    NO_COPIES,
    READY_S,
    mesh_of,
    meshnode,
    serving,
    small_model,
    tokens_of,
)
from tests.refs import ref

pytestmark = [pytest.mark.ipfs, pytest.mark.slow]

FIND_S = 60


@dataclass
class Ours:
    """The parts of a node that find, provide and exchange blocks; it knows one DHT peer and nobody else."""

    host: Libp2pHost
    store: BlobStore
    dht: DhtClient
    content: ContentService
    searches: trio.CancelScope  # ends what the DHT part does by itself

    async def provided(self, cid: Cid) -> None:
        """Wait until a DHT peer has our record."""
        with trio.fail_after(FIND_S):
            while not self.dht.provided.get(cid):
                await self.dht.changes.wait()


@asynccontextmanager
async def ours(folder: Path, seed: Kubo, provides: Path | None = None) -> AsyncIterator[Ours]:
    """`provides`: a file that everybody may have."""
    host = open_host(os.urandom(32))
    store = BlobStore(folder, 1 << 40)
    public = () if provides is None else (store.add_file(provides, pin="test"),)
    external = ExternalPeers(host, ExternalSettings(offers=(BITSWAP,) if public else ()), random.Random(1))
    dht = DhtClient(
        host,
        external,
        Network(()),
        DhtSettings(seeds=seed.addresses, protocols=(BITSWAP,)),
        random.Random(1),
        shared=Shared(public),
    )
    content = content_of(host, store, Known(host), finder=dht, share="anyone" if public else "members")
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        for part in (host, external, content):
            await nursery.start(part.run)
        searches = await stack.enter_async_context(trio.open_nursery())
        stack.callback(searches.cancel_scope.cancel)
        await searches.start(dht.run)
        yield Ours(host, store, dht, content, searches.cancel_scope)


async def introduced(one: Kubo, other: Kubo, folder: Path) -> None:
    """Connect two Kubos and wait until the first one has the other in its DHT table: it tells us of it."""
    assert await one.call("connect", other.addresses[0]) == 0
    async with ours(folder, one) as node:
        with trio.fail_after(FIND_S):
            while node.dht.known_peers < 2:  # noqa: ASYNC110 - Kubo tells nobody
                await trio.sleep(0.1)


async def test_what_only_a_kubo_holds_is_found_and_fetched(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(5 << 20)
    async with kubo(tmp_path / "router", routing="dht") as router, kubo(tmp_path / "holder", routing="dht") as holder:
        await introduced(holder, router, tmp_path / "probe")
        (tmp_path / "file").write_bytes(data)
        cid = cid_of_old(await holder.call("add", str(tmp_path / "file")))
        async with ours(tmp_path / "ours", router) as node:
            with trio.fail_after(FIND_S):
                opened = await node.content.open(ref(cid, len(data)))
            assert await trio.Path(opened.path).read_bytes() == data
            assert node.content.fetched_from[holder.peer] >= len(data)
            assert not node.content.fetched_from[router.peer]


async def test_a_kubo_finds_and_fetches_what_only_we_hold(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(5 << 20)
    (tmp_path / "file").write_bytes(data)
    async with (
        kubo(tmp_path / "router", routing="dht") as router,
        ours(tmp_path / "ours", router, tmp_path / "file") as node,
    ):
        cid = file_cid(data)
        await node.provided(cid)
        node.searches.cancel()  # from now on, we dial nobody
        async with kubo(tmp_path / "asker", routing="dht") as asker:
            assert await asker.call("connect", router.addresses[0]) == 0
            assert node.host.peer_id not in await asker.call("peers")
            with trio.fail_after(FIND_S):
                assert await asker.get(cid, tmp_path / "copy") == data
            assert node.host.peer_id in await asker.call("peers")
            assert node.content.served_to[asker.peer] >= len(data)
            assert not node.content.served_to[router.peer]


async def test_a_kubo_and_another_network_find_a_model_of_ours(tmp_path: Path) -> None:
    """The first network shares with anyone. Strangers get its files, and nothing else."""
    published = small_model(tmp_path / "model", layer_bytes=1 << 20)
    async with kubo(tmp_path / "router", routing="dht") as router:
        dht = ("content.dht", router.addresses[0])
        with mesh_of(tmp_path / "first", 1, published=published, settings=(dht, ("content.share", "anyone"))) as mesh:
            first = mesh.members[0]
            answer = await trio.to_thread.run_sync(tokens_of, first)
            files = [path.read_bytes() for path in published.iterdir() if path.name != "index.json"]
            status = await trio.to_thread.run_sync(
                first.wait_for,
                lambda status: status.content.dht.provided > len(set(files)),  # these and the manifest
                FIND_S,
                "to name itself in the DHT for every file",
            )
            manifest = Cid(status.model.manifest)
            async with kubo(tmp_path / "asker", routing="dht") as asker:
                assert await asker.call("connect", router.addresses[0]) == 0
                for data in files:
                    with trio.fail_after(FIND_S):
                        assert await asker.get(file_cid(data), tmp_path / "copy") == data
            status = await trio.to_thread.run_sync(first.status)
            assert status.refusals == () and status.ready and status.peers == ()
            assert status.content.served_bytes >= sum(map(len, files))

            with mesh_of(tmp_path / "second", 1, settings=(dht, *NO_COPIES)) as second:
                ran = await trio.to_thread.run_sync(
                    lambda: meshnode("model", "add", f"ipfs://{manifest}", folder=second.members[0].folder)
                )
                assert ran.code == 0, ran.errors
                await trio.to_thread.run_sync(second.wait_ready, READY_S)
                assert await trio.to_thread.run_sync(tokens_of, second.members[0]) == answer
                status = await trio.to_thread.run_sync(second.members[0].status)
                assert status.model.manifest == manifest and status.refusals == ()
                assert len(serving(status)) == 1
            status = await trio.to_thread.run_sync(first.status)
            assert status.refusals == () and status.ready
