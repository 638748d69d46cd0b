"""A real IPFS daemon, js-ipfs, that keeps the served model of a node of ours: added, pinned, moved, restarted."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import cbor2
import pytest
import trio

from meshnode.core.health import Health
from meshnode.ipfs.rpc import IpfsApi
from meshnode.services import ipfs_daemon as daemon_service
from meshnode.services.ipfs_daemon import IpfsDaemonService, Publication
from meshnode.state.database import Database
from protocols.ids import DAG_CBOR, RAW, Cid, cid_of, cid_to_bytes
from tests.ipfs.test_rpc_js_ipfs import daemon, started
from tests.ipfs.world import JS_IPFS, NODE, Ours, ours
from tests.services.test_content import MIB, noise
from tests.services.test_ipfs_daemon import Model, Release, Us

pytestmark = [pytest.mark.ipfs, pytest.mark.slow]

NEEDS = (NODE, JS_IPFS)
NOWHERE = cid_of(RAW, b"a layer of a variant that nobody holds")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEET_S", "FIRST_PAUSE_S", "FIRST_REST_S"):
        monkeypatch.setattr(daemon_service, name, 0.2)


def manifest_of(*files: Cid) -> bytes:
    """A block with links, one of which leads nowhere."""
    links = [cbor2.CBORTag(42, b"\0" + cid_to_bytes(cid)) for cid in (*files, NOWHERE)]
    return cbor2.dumps({"files": links}, canonical=True)


class Beside:
    """A node of ours beside a daemon."""

    def __init__(self, node: Ours, address: str, state: Path) -> None:
        self.node = node
        self.health = Health()
        self.api = IpfsApi(address, self.health, call_s=20)
        self.state = state
        self.model = Model()
        self.sent: list[Cid] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[IpfsDaemonService]:
        """From one start of the node to its end."""
        node = self.node
        with Database(self.state) as records:
            publication = Publication(
                self.api, node.store, records, self.health, held=self.model, releases=self.model
            )
            service = IpfsDaemonService(self.api, node.host, node.guests, Us(), publication, self.health)
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                yield service
                nursery.cancel_scope.cancel()

    def serve(self, *files: Cid) -> Release:
        block = manifest_of(*files)
        release = Release("a model int4", self.node.store.put_block(block, DAG_CBOR), (*files, NOWHERE))
        self.model.serve(release)
        return release


async def until(true: Callable[[], object], seconds: float = 60) -> None:
    """What another process does is looked at now and then."""
    with trio.fail_after(seconds):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.1)


async def test_the_served_model_is_kept_under_its_cids_and_let_go(tmp_path: Path) -> None:
    async with daemon(tmp_path / "daemon") as (address, _), ours(tmp_path / "node", share=True) as node:
        it = Beside(node, address, tmp_path / "state")
        large, common, later = (node.add(tmp_path, noise(size * MIB + 3, size)) for size in (192, 2, 5))
        own = node.add(tmp_path, b"what the operator keeps")
        assert await it.api.add(node.store.path(own) or tmp_path) == own
        first = it.serve(large, common, own)
        tracemalloc.start()
        try:
            async with it.running() as service:
                await until(lambda: service.published == {first.cid, large, common, own})
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 24 * MIB  # the file has 192
        assert await it.api.pinned(large) and await it.api.pinned(common)
        assert await it.api.pinned(first.cid, recursive=False)
        assert await it.api.block(first.cid) == node.store.block(first.cid)
        leaf = cid_of(RAW, noise(192 * MIB + 3, 192)[:MIB])
        assert cid_of(RAW, await it.api.block(leaf)) == leaf

        second = it.serve(common, later)  # while the node was away
        async with it.running() as service:
            await until(lambda: service.published == {second.cid, common, later})
        assert not await it.api.pinned(large)
        assert not await it.api.pinned(first.cid, recursive=False)
        assert await it.api.pinned(own)
        assert it.health.current() == []


async def test_a_daemon_that_was_away_is_supplied_again(tmp_path: Path) -> None:
    folder = tmp_path / "daemon"
    async with ours(tmp_path / "node") as node, daemon(folder) as (address, process):
        it = Beside(node, address, tmp_path / "state")
        one, two = (node.add(tmp_path, noise(3 * MIB, number)) for number in (1, 2))
        first = it.serve(one)
        async with it.running() as service:
            await until(lambda: service.published == {first.cid, one})
            process.kill()
            await process.wait()
            await until(lambda: [shown.code for shown in it.health.current()] == ["ipfs-daemon"])
            second = it.serve(one, two)
            config = folder / "repo" / "config"
            settings = json.loads(config.read_text())
            settings["Addresses"]["API"] = address
            config.write_text(json.dumps(settings))
            shutil.rmtree(folder / "repo" / "repo.lock", ignore_errors=True)  # it was killed
            async with started(folder):
                await until(lambda: service.published == {second.cid, one, two})
                assert it.health.current() == []
                assert not await it.api.pinned(first.cid, recursive=False)


async def test_without_a_muxer_in_common_it_is_named_and_used_through_its_rpc(tmp_path: Path) -> None:
    """js-ipfs speaks mplex and no Yamux, so that no blocks can flow over Bitswap."""
    async with daemon(tmp_path / "daemon") as (address, _), ours(tmp_path / "node", share=True) as node:
        it = Beside(node, address, tmp_path / "state")
        release = it.serve(node.add(tmp_path, b"a layer"))
        async with it.running() as service:
            await until(lambda: len(service.published) == 2)
            assert (await it.api.identity())[1]
            await until(lambda: "yamux" in "".join(node.guests.failures().values()))
            assert node.host.guests == ()
            assert await it.api.block(release.cid)
