"""Blocks between our nodes and a real Helia, over TCP, Noise and Yamux: both ways, and when it dies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from meshnode.core.errors import ContentUnavailable
from protocols.ids import Cid
from protocols.unixfs.builder import file_cid
from tests.ipfs.test_bitswap_kubo import LARGE, MIB, noise
from tests.ipfs.world import HELIA, LIBRARY, NODE, helia, kubo, ours
from tests.refs import ref

NEEDS = (NODE, HELIA, LIBRARY)
pytestmark = [pytest.mark.ipfs, pytest.mark.slow]


@pytest.mark.parametrize("size", [1, MIB, LARGE, 180 * MIB], ids=["one byte", "one block", "64 MiB", "two levels"])
async def test_a_file_goes_to_helia_and_comes_back_from_it(tmp_path: Path, size: int) -> None:
    data = noise(size)
    async with helia() as there:
        async with ours(tmp_path / "seeder", [there], share=True) as seeder:
            cid = seeder.add(tmp_path, data)
            assert await there.get(cid, tmp_path / "from-us") == data
            assert size <= seeder.content.served_to[there.peer] < 1.1 * size + 1000
        async with ours(tmp_path / "leecher", [there]) as leecher:
            opened = await leecher.content.open(ref(cid, size))
            assert opened.path.read_bytes() == data
            assert leecher.content.fetched_from[there.peer] < 1.1 * size + 1000
            assert leecher.content.bad_providers() == {}


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1, LARGE], ids=["empty", "one byte", "1 MiB", "two", "64 MiB"])
async def test_what_helia_adds_has_our_cid_and_comes_to_us(tmp_path: Path, size: int) -> None:
    data = noise(size)
    (tmp_path / "payload").write_bytes(data)
    async with helia() as there, ours(tmp_path / "node", [there]) as node:
        cid = await there.call("add", str(tmp_path / "payload"))
        assert cid == file_cid(data)
        assert (await node.content.open(ref(Cid(cid), size))).path.read_bytes() == data


async def test_helia_dials_us_and_our_file_goes_on_to_a_kubo_from_there(tmp_path: Path) -> None:
    """Kubo knows the Helia alone."""
    data = noise(LARGE)
    async with helia() as between, kubo(tmp_path / "kubo") as last:
        async with ours(tmp_path / "seeder", [between], share=True) as seeder:
            cid = seeder.add(tmp_path, data)
            assert await between.get(cid, tmp_path / "first") == data
        assert await last.call("connect", between.addresses[0]) == 0
        assert await last.get(cid, tmp_path / "second") == data


async def test_helia_gets_nothing_that_is_not_shared(tmp_path: Path) -> None:
    data = noise(3 * MIB)
    async with helia() as there, ours(tmp_path / "closed", [there]) as closed:
        cid = closed.add(tmp_path, data)
        async with ours(tmp_path / "asker", [there], patience=3) as asker:
            with pytest.raises(ContentUnavailable, match="does not have it"):
                await asker.content.fetch(ref(cid, len(data)))
        with trio.move_on_after(2) as limit:
            await there.call("get", cid, str(tmp_path / "out"))
        assert limit.cancelled_caught
        assert closed.content.bytes_served == 0


async def test_a_helia_that_is_killed_on_the_way_and_another_that_goes_on(tmp_path: Path) -> None:
    data = noise(LARGE)
    (tmp_path / "payload").write_bytes(data)
    async with helia() as first, helia() as second, ours(tmp_path / "leecher", [first, second]) as leecher:
        for there in (first, second):
            cid = Cid(await there.call("add", str(tmp_path / "payload")))
        killed: list[int] = []

        def watch(done: int, size: int) -> None:
            if done >= 0.4 * size and not killed:
                killed.append(done)
                first.kill()

        opened = await leecher.content.open(ref(cid, len(data)), progress=watch)
        assert killed and killed[0] < len(data)
        assert hashlib.sha256(opened.path.read_bytes()).digest() == hashlib.sha256(data).digest()
        assert leecher.content.bad_providers() == {}
