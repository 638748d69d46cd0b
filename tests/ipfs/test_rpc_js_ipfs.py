"""The RPC of a real IPFS daemon, js-ipfs: the same CIDs, blocks for a node without peers, and its death.

Kubo's own RPC is not in reach of these tests: its packaged library leaves it out. Give the multiaddr of a running
Kubo in MESHNODE_TEST_IPFS_API to have it tested in place of js-ipfs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.ipfs.rpc import DaemonRefused, IpfsApi
from meshnode.ipfs.source_order import Fallback, SourceFailed, verified
from meshnode.store.blob_store import BlobStore
from protocols.ids import RAW, cid_of
from protocols.unixfs.builder import file_cid
from tests.ipfs.world import JS_IPFS, NODE
from tests.refs import ref
from tests.services.test_content import ME, MIB, QUOTA, network, noise

pytestmark = pytest.mark.ipfs

GIVEN = os.environ.get("MESHNODE_TEST_IPFS_API", "")
NEEDS = () if GIVEN else (NODE, JS_IPFS)
PROGRAM = (str(NODE), str(JS_IPFS / "src" / "cli.js"))
START_S = 60
ANY_PORT = "/ip4/127.0.0.1/tcp/0"
CONFIG = {
    "Addresses": {"Swarm": [ANY_PORT], "API": ANY_PORT, "Gateway": ANY_PORT, "RPC": ANY_PORT, "Delegates": []},
    "Bootstrap": [],
    "Discovery": {"MDNS": {"Enabled": False}, "webRTCStar": {"Enabled": False}},
    "Swarm": {"DisableNatPortMap": True},
}


@asynccontextmanager
async def daemon(folder: Path) -> AsyncIterator[tuple[str, trio.Process]]:
    """The multiaddr of a daemon's RPC, and its process; killed at the end."""
    config = _configured(folder)
    with trio.fail_after(START_S):
        await trio.run_process(
            [*PROGRAM, "init", "--empty-repo", "--defaultConfig", str(config)],
            env={**os.environ, "IPFS_PATH": str(folder / "repo")},
            capture_stdout=True,
        )
    async with started(folder) as there:
        yield there


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[tuple[str, trio.Process]]:
    """The same of a repository that is there already."""
    process = await trio.lowlevel.open_process(
        [*PROGRAM, "daemon", "--enable-preload=false"],
        env={**os.environ, "IPFS_PATH": str(folder / "repo")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        with trio.fail_after(START_S):
            address = await _address(process)
        yield address, process
    finally:
        process.kill()
        await process.wait()


def _configured(folder: Path) -> Path:
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    return config


async def _address(process: trio.Process) -> str:
    assert process.stdout is not None
    said = ""
    while "Daemon is ready" not in said:
        piece = await process.stdout.receive_some()
        assert piece, f"js-ipfs ended: {said}"
        said += piece.decode()
    match = re.search(r"HTTP API listening on (/ip4/127\.0\.0\.1/tcp/[0-9]+)/http", said)
    assert match, said
    return match[1]


@asynccontextmanager
async def api(folder: Path, health: Health) -> AsyncIterator[IpfsApi]:
    """A daemon's RPC, ours to use."""
    if GIVEN:
        yield IpfsApi(GIVEN, health, block_s=2)
        return
    async with daemon(folder / "daemon") as (address, _):
        yield IpfsApi(address, health, block_s=2)


async def test_what_it_adds_has_our_cid_and_its_blocks_are_ours(tmp_path: Path) -> None:
    health = Health()
    async with api(tmp_path, health) as daemon_api:
        assert await daemon_api.version()
        peer, addresses = await daemon_api.identity()
        assert all(address.endswith(f"/p2p/{peer}") for address in addresses) and addresses
        for size in (0, 1, MIB, MIB + 1, 64 * MIB):  # a lone leaf; a root with two and with 64 links
            data = noise(size, size)
            source = tmp_path / str(size)
            source.write_bytes(data)
            cid = await daemon_api.add(source)
            assert cid == file_cid(data)
            root = verified(daemon_api.name, cid, await daemon_api.block(cid))
            assert root == data or size > MIB
            await daemon_api.pin(cid)
            await daemon_api.unpin(cid)
            await daemon_api.unpin(cid)  # is not pinned any more
        with pytest.raises(ContentUnavailable):
            await daemon_api.block(cid_of(RAW, b"nobody has this"))
        with pytest.raises(DaemonRefused):
            await daemon_api.pin(cid_of(RAW, b"nobody has this"), seconds=1)
        with pytest.raises(DaemonRefused):
            await daemon_api.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{peer}")
    assert health.current() == []


async def test_a_node_without_peers_gets_a_file_from_it(tmp_path: Path) -> None:
    data = noise(64 * MIB)
    source = tmp_path / "layer"
    source.write_bytes(data)
    async with api(tmp_path, Health()) as daemon_api:
        cid = await daemon_api.add(source)
        async with network(tmp_path) as net:
            store = BlobStore(tmp_path / "reader", QUOTA)
            host = net.host(ME)
            me = content_of(host, store, Known(host), outside=Fallback([daemon_api]))
            await net.nursery.start(me.run)
            assert (await me.open(ref(cid, len(data)))).path.read_bytes() == data


@pytest.mark.skipif(bool(GIVEN), reason="an operator's daemon is not ours to kill")
async def test_a_daemon_that_is_killed_stands_in_the_health(tmp_path: Path) -> None:
    health = Health()
    async with daemon(tmp_path / "daemon") as (address, process):
        daemon_api = IpfsApi(address, health)
        assert await daemon_api.check()
        process.kill()
        await process.wait()
        with pytest.raises(SourceFailed):
            await daemon_api.block(cid_of(RAW, b"any"))
    assert [shown.code for shown in health.current()] == ["ipfs-daemon"]
