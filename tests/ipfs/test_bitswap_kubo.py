"""Blocks between our nodes and a real Kubo, over TCP, Noise and Yamux: both ways, and when a Kubo dies."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest
import trio

from meshnode.core.errors import ContentUnavailable
from protocols.ids import Cid, cid_of_old
from tests.ipfs.world import kubo, ours
from tests.refs import ref

pytestmark = [pytest.mark.ipfs, pytest.mark.slow]

MIB = 1 << 20
LARGE = 64 * MIB


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


@pytest.mark.parametrize("size", [1, MIB, LARGE, 180 * MIB], ids=["one byte", "one block", "64 MiB", "two levels"])
async def test_a_file_goes_to_kubo_and_comes_back_from_it(tmp_path: Path, size: int) -> None:
    data = noise(size)
    async with kubo(tmp_path / "kubo") as there:
        async with ours(tmp_path / "seeder", [there], share=True) as seeder:
            cid = seeder.add(tmp_path, data)
            assert await there.get(cid, tmp_path / "from-us") == data
            assert size <= seeder.content.served_to[there.peer] < 1.1 * size + 1000
        async with ours(tmp_path / "leecher", [there]) as leecher:
            opened = await leecher.content.open(ref(cid, size))
            assert opened.path.read_bytes() == data
            assert leecher.content.fetched_from[there.peer] < 1.1 * size + 1000
            assert leecher.content.bad_providers() == {}
        assert leecher.store.folder != seeder.store.folder


@pytest.mark.parametrize("size", [0, 1, MIB, LARGE], ids=["empty", "one byte", "1 MiB", "64 MiB"])
async def test_what_kubo_adds_by_default_comes_to_us_and_goes_to_another_kubo(tmp_path: Path, size: int) -> None:
    """CIDv0 and leaves that are dag-pb nodes; we pass them on under the names that Kubo asks for."""
    data = noise(size)
    (tmp_path / "payload").write_bytes(data)
    async with kubo(tmp_path / "first") as first, kubo(tmp_path / "second") as second:
        name = await first.call("add", str(tmp_path / "payload"))
        assert name.startswith("Qm")
        cid = cid_of_old(name)
        async with ours(tmp_path / "between", [first]) as node:
            assert (await node.content.open(ref(cid, size))).path.read_bytes() == data
            assert node.content.bad_providers() == {}
        first.kill()
        async with ours(tmp_path / "between", [second], share=True) as node:
            assert await second.get(name, tmp_path / "copy") == data
            assert node.content.served_to[second.peer] >= size


async def test_kubo_gets_nothing_that_is_not_shared(tmp_path: Path) -> None:
    data = noise(3 * MIB)
    async with (
        kubo(tmp_path / "kubo") as there,
        ours(tmp_path / "closed", [there]) as closed,
        ours(tmp_path / "asker", [there], patience=5) as asker,
    ):
        cid = closed.add(tmp_path, data)
        with pytest.raises(ContentUnavailable, match="does not have it"):
            await asker.content.fetch(ref(cid, len(data)))  # Kubo looks for it at everybody it is connected to
        with trio.move_on_after(3) as limit:
            await there.call("get", cid, str(tmp_path / "out"))
        assert limit.cancelled_caught
        assert closed.content.bytes_served == 0


async def test_a_kubo_that_is_killed_on_the_way_and_another_that_goes_on(tmp_path: Path) -> None:
    data = noise(LARGE)
    async with kubo(tmp_path / "first") as first, kubo(tmp_path / "second") as second:
        async with ours(tmp_path / "seeder", [first, second], share=True) as seeder:
            cid = seeder.add(tmp_path, data)
            for there in (first, second):
                assert await there.get(cid, tmp_path / "copy") == data
        async with ours(tmp_path / "leecher", [first, second]) as leecher:
            killed: list[int] = []

            def watch(done: int, size: int) -> None:
                if done >= 0.4 * size and not killed:
                    killed.append(done)
                    first.kill()

            opened = await leecher.content.open(ref(cid, len(data)), progress=watch)
            assert killed and killed[0] < len(data)
            assert hashlib.sha256(opened.path.read_bytes()).digest() == hashlib.sha256(data).digest()
            assert leecher.content.bad_providers() == {}
            await leecher.left(first.peer)
            assert first.peer in leecher.guests.failures()
            assert leecher.host.guests == (second.peer,)


async def test_a_kubo_that_hangs_and_another_that_goes_on(tmp_path: Path) -> None:
    data = noise(LARGE)
    async with kubo(tmp_path / "first") as first, kubo(tmp_path / "second") as second:
        async with ours(tmp_path / "seeder", [first, second], share=True) as seeder:
            cid = seeder.add(tmp_path, data)
            for there in (first, second):
                assert await there.get(cid, tmp_path / "copy") == data
        async with ours(tmp_path / "leecher", [first, second]) as leecher:

            def watch(done: int, size: int) -> None:
                if done >= 0.4 * size:
                    first.process.send_signal(signal.SIGSTOP)

            opened = await leecher.content.open(ref(cid, len(data)), progress=watch)
            assert hashlib.sha256(opened.path.read_bytes()).digest() == hashlib.sha256(data).digest()
            assert leecher.content.fetched_from[second.peer] > 0.2 * len(data)
            assert leecher.content.bad_providers() == {}


async def test_a_kubo_that_is_killed_with_nobody_else_is_named_and_what_came_is_kept(tmp_path: Path) -> None:
    data = noise(LARGE)
    async with kubo(tmp_path / "second") as second:
        async with kubo(tmp_path / "first") as first:
            async with ours(tmp_path / "seeder", [first, second], share=True) as seeder:
                cid: Cid = seeder.add(tmp_path, data)
                for there in (first, second):
                    assert await there.get(cid, tmp_path / "copy") == data
            async with ours(tmp_path / "leecher", [first], patience=4) as leecher:

                def watch(done: int, size: int) -> None:
                    if done >= 0.4 * size:
                        first.kill()

                with pytest.raises(ContentUnavailable, match=r"not reachable.*what has come so far is kept"):
                    await leecher.content.fetch(ref(cid, len(data)), progress=watch)
        async with ours(tmp_path / "leecher", [second]) as leecher:
            assert (await leecher.content.open(ref(cid, len(data)))).path.read_bytes() == data
            assert leecher.content.bytes_fetched < 0.7 * len(data)
