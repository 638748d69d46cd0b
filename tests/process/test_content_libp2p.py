"""Good, slow, corrupt and killed providers in processes of their own, over the real libp2p and direct lanes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from meshnode.bench.content import DEFAULT_HOST
from meshnode.bench.known import Known, content_of
from meshnode.bench.provider import Provider, host_from, providers
from meshnode.core.errors import ContentUnavailable
from meshnode.services.content.service import ContentService
from meshnode.store.blob_store import BlobStore
from protocols.ids import Cid, PeerId
from protocols.unixfs.builder import file_cid
from tests.refs import ref

pytestmark = [pytest.mark.net, pytest.mark.process]

MIB = 1 << 20
SIZE = 100 * MIB + 7


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Cid]:
    """A content folder with one file of 101 blocks and their inner node."""
    folder = tmp_path_factory.mktemp("source")
    data = os.urandom(SIZE)
    (folder / "payload").write_bytes(data)
    store = BlobStore(folder / "content", 1 << 40)
    store.add_file(folder / "payload", pin="test")
    store.close()
    return folder / "content", data, file_cid(data)


@dataclass
class World:
    content: ContentService
    providers: list[Provider]

    def peer(self, kind: str) -> PeerId:
        (found,) = (provider.peer for provider in self.providers if provider.kind == kind)
        return found


@asynccontextmanager
async def world(source: Path, target: Path, kinds: Sequence[str], patience: float = 30.0) -> AsyncIterator[World]:
    """A node that fetches, connected to one provider of each kind."""
    host = host_from(DEFAULT_HOST)
    store = BlobStore(target, 1 << 40)
    chosen: list[PeerId] = []
    content = content_of(host, store, Known(host, chosen), patience_s=patience)
    with trio.fail_after(90):
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            await nursery.start(content.run)
            with providers(DEFAULT_HOST, source, host.peer_id, kinds) as started:
                for provider in started:
                    host.admit(provider.peer, True)
                    await host.connect(provider.peer, provider.addresses)
                chosen += [provider.peer for provider in started]
                yield World(content, started)
            nursery.cancel_scope.cancel()
    store.close()


@pytest.mark.parametrize(
    "kinds", [("corrupt", "slow", "good"), ("good", "slow", "corrupt"), ("slow", "corrupt", "good")]
)
async def test_one_good_one_slow_one_corrupt(
    source: tuple[Path, bytes, Cid], tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    folder, data, cid = source
    async with world(folder, tmp_path / "target", kinds) as here:
        opened = await here.content.open(ref(cid, SIZE))
        assert opened.path.read_bytes() == data
        bad = here.content.bad_providers()
        if kinds[0] == "corrupt" or bad:  # one that was never asked can't have sent wrong bytes
            assert list(bad) == [here.peer("corrupt")]
            assert "hash to no block it was asked for" in bad[here.peer("corrupt")]
        assert here.content.fetched_from[here.peer("good")] > 0.8 * SIZE
        assert here.content.fetched_from[here.peer("corrupt")] <= 8 * MIB


async def test_wrong_bytes_alone_are_named_and_nothing_of_them_is_kept(
    source: tuple[Path, bytes, Cid], tmp_path: Path
) -> None:
    folder, data, cid = source
    async with world(folder, tmp_path / "target", ["corrupt"], patience=2) as here:
        with pytest.raises(ContentUnavailable, match=r"dropped, it sent .* hash to no block it was asked for"):
            await here.content.fetch(ref(cid, SIZE))
    for path in (tmp_path / "target").rglob("*.part"):
        assert not any(path.read_bytes()), "a wrong byte is on the disk"
    async with world(folder, tmp_path / "target", ["good"]) as here:
        assert (await here.content.open(ref(cid, SIZE))).path.read_bytes() == data


async def test_the_seeder_in_use_is_killed_at_40_percent(source: tuple[Path, bytes, Cid], tmp_path: Path) -> None:
    folder, data, cid = source
    async with world(folder, tmp_path / "target", ["good"] * 3) as here:
        killed: list[PeerId] = []

        def watch(done: int, size: int) -> None:
            if done >= 0.4 * size and not killed:
                killed.append(here.content.fetched_from.most_common(1)[0][0])
                next(provider for provider in here.providers if provider.peer == killed[0]).process.kill()

        opened = await here.content.open(ref(cid, SIZE), progress=watch)
        assert opened.path.read_bytes() == data
        others = {provider.peer for provider in here.providers} - set(killed)
        assert sum(here.content.fetched_from[peer] for peer in others) > 0.3 * SIZE
        assert here.content.bad_providers() == {}
