"""The content service among several nodes in one process: good, slow, corrupt and dying providers."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ContentUnavailable, DiskError, ModelError, PeerUnreachable
from meshnode.net.port import Lane, Stream
from meshnode.services.content.service import ContentService
from meshnode.sim.network import MemoryHost, MemoryNetwork, MemoryStream
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.ledger import MAX_WINDOW_BYTES
from protocols.bitswap.messages import PROTOCOL, Block, Entry, Message, frame_parts
from protocols.bitswap.stalls import DOUBT_S
from protocols.ids import DAG_CBOR, PeerId, cid_of
from protocols.unixfs.builder import file_cid
from tests.refs import ref

MIB = 1 << 20
PIECE = 1 << 16
QUOTA = 1 << 30
ME, A, B, C = PeerId("me"), PeerId("provider-a"), PeerId("provider-b"), PeerId("provider-c")


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


class Network:
    """Members on a network in memory, each connected with all others."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.nursery = nursery
        self.folder = folder
        self.memory = MemoryNetwork()

    @property
    def hosts(self) -> Mapping[PeerId, MemoryHost]:
        """Those that run."""
        return self.memory.hosts

    def host(self, peer: PeerId) -> MemoryHost:
        return self.memory.host(peer)

    async def join(self, host: MemoryHost) -> MemoryHost:
        await self.nursery.start(host.run)
        for other in [other for other in self.hosts.values() if other is not host]:
            host.admit(other.peer_id, True)
            other.admit(host.peer_id, True)
            await host.connect(other.peer_id, other.addresses)
        return host

    def kill(self, peer: PeerId) -> None:
        """The peer is gone, as after SIGKILL: its streams break, everybody is told."""
        self.memory.kill(peer)

    def slow(self, peer: PeerId, rate: float) -> None:
        """Bytes per second between this peer and ME."""
        self.memory.set_link(ME, peer, bandwidth=rate)

    async def node(
        self,
        peer: PeerId,
        *files: bytes,
        providers: Sequence[PeerId] = (),
        store: BlobStore | None = None,
        patience: float = 20,
    ) -> tuple[ContentService, BlobStore, MemoryHost]:
        """A running node that holds some files."""
        host = self.host(peer)
        store = store or BlobStore(self.folder / peer, QUOTA)
        for number, data in enumerate(files):
            source = self.folder / f"{peer}-{number}"
            source.write_bytes(data)
            store.add_file(source, pin="test")
        service = content_of(host, store, Known(host, providers), patience_s=patience)
        await self.join(host)
        await self.nursery.start(service.run)
        return service, store, host


def streams(host: MemoryHost, peer: PeerId) -> list[MemoryStream]:
    """Those that are open between a node and a peer, at the end of this node."""
    return [stream for stream in host.connections[peer].streams if stream.peer == peer]


@asynccontextmanager
async def network(folder: Path) -> AsyncIterator[Network]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            yield Network(nursery, folder)
            nursery.cancel_scope.cancel()


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Network]:
    async with network(tmp_path) as made:
        yield made


async def test_one_provider(net: Network) -> None:
    data = noise(9 * MIB + 5)
    a, _, _ = await net.node(A, data)
    me, store, host = await net.node(ME, providers=(ME, A))
    seen: list[tuple[int, int]] = []
    opened = await me.open(ref(file_cid(data), len(data)), progress=lambda *done: seen.append(done))
    assert opened.path.read_bytes() == data
    assert opened.path == store.path(file_cid(data))
    assert seen[-1] == (len(data), len(data)) and seen == sorted(seen)
    assert len(data) < me.bytes_fetched < len(data) * 1.001
    assert a.bytes_served == me.bytes_fetched == me.fetched_from[A] == a.served_to[ME]
    again: list[int] = []
    await me.fetch(ref(file_cid(data), len(data)), progress=lambda done, _: again.append(done))
    assert again == [len(data)]
    assert len(streams(host, A)) == 2, "one in each direction"
    assert me.bad_providers() == {}


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1])
async def test_small_files(net: Network, size: int) -> None:
    data = noise(size)
    await net.node(A, data)
    me, _, _ = await net.node(ME, providers=(A,))
    assert (await me.open(ref(file_cid(data), size))).path.read_bytes() == data


async def test_many_files_over_one_stream(net: Network) -> None:
    files = [noise(MIB // 2 * n, n) for n in range(1, 9)]
    await net.node(A, *files)
    me, store, host = await net.node(ME, providers=(A,))
    async with trio.open_nursery() as nursery:
        for data in files:
            nursery.start_soon(me.fetch, ref(file_cid(data), len(data)))
    assert store.files() == {file_cid(data) for data in files}
    assert len(streams(host, A)) == 2, "one in each direction"


async def test_three_providers_share_the_work(net: Network) -> None:
    data = noise(24 * MIB)
    for peer in (A, B, C):
        await net.node(peer, data)
        net.slow(peer, 8 * MIB)  # from one that is as fast as this machine, everything would come
    me, _, _ = await net.node(ME, providers=(A, B, C))
    assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    assert all(me.fetched_from[peer] >= 2 * MIB for peer in (A, B, C))
    assert me.bytes_fetched < len(data) + 3 * MIB


class CorruptStore(BlobStore):
    """Flips a byte in every leaf."""

    def read_blocks(self, cids: Sequence[bytes]) -> list[bytes | None]:
        return [
            data if data is None or len(data) < PIECE else data[:100] + bytes((data[100] ^ 1,)) + data[101:]
            for data in super().read_blocks(cids)
        ]


async def test_who_sends_wrong_bytes_is_named_and_the_file_comes_from_another(net: Network, tmp_path: Path) -> None:
    data = noise(12 * MIB)
    await net.node(A, data, store=CorruptStore(tmp_path / "corrupt", QUOTA))
    await net.node(B, data)
    me, _, _ = await net.node(ME, providers=(A, B))
    assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    with trio.fail_after(DOUBT_S + 5):  # the file does not wait for the judgement
        while not me.bad_providers():  # noqa: ASYNC110 - nothing else tells
            await trio.sleep(0.05)
    assert list(me.bad_providers()) == [A]
    assert "hash to no block it was asked for" in me.bad_providers()[A]


async def test_where_only_wrong_bytes_come_the_error_names_who_sent_them(net: Network, tmp_path: Path) -> None:
    data = noise(2 * MIB)
    await net.node(A, data, store=CorruptStore(tmp_path / "corrupt", QUOTA))
    me, store, _ = await net.node(ME, providers=(A,), patience=2 * DOUBT_S)
    with pytest.raises(ContentUnavailable, match="dropped, it sent") as caught:
        await me.fetch(ref(file_cid(data), len(data)))
    assert caught.value.cid == file_cid(data)
    assert not any(any(part.read_bytes()) for part in store.folder.glob("files/*.part")), (
        "a wrong byte is on the disk"
    )


async def test_a_slow_provider_does_not_hold_the_others_up(net: Network) -> None:
    data = noise(24 * MIB)
    await net.node(A, data)
    net.slow(A, 256 << 10)  # four seconds for each block
    await net.node(B, data)
    me, _, _ = await net.node(ME, providers=(A, B))
    with trio.fail_after(15):  # a quarter of what the slow one alone needs for its first window and file
        assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data
    assert me.fetched_from[B] > 18 * MIB
    assert me.bad_providers() == {}


async def test_a_provider_that_dies_on_the_way(net: Network) -> None:
    data = noise(20 * MIB)
    for peer in (A, B, C):
        await net.node(peer, data)
    me, _, _ = await net.node(ME, providers=(A, B, C))

    def watch(done: int, size: int) -> None:
        if done >= size * 0.4 and A in net.hosts:
            net.kill(A)

    assert (await me.open(ref(file_cid(data), len(data)), progress=watch)).path.read_bytes() == data
    assert A not in net.hosts
    assert me.bad_providers() == {}


async def test_a_broken_stream_is_opened_again(net: Network) -> None:
    data = noise(20 * MIB)
    _, _, host = await net.node(A, data)
    me, _, _ = await net.node(ME, providers=(A,))
    cut: list[int] = []

    def watch(done: int, size: int) -> None:
        if done >= size * 0.4 and not cut:
            cut.append(done)
            for stream in streams(host, ME):
                net.nursery.start_soon(stream.reset)

    assert (await me.open(ref(file_cid(data), len(data)), progress=watch)).path.read_bytes() == data
    assert cut


async def test_a_transfer_stopped_at_half_goes_on_from_there(net: Network) -> None:
    data = noise(40 * MIB)
    await net.node(A, data)
    me, store, _ = await net.node(ME, providers=(A,))
    done_before = 0
    with trio.CancelScope() as scope:

        def watch(done: int, size: int) -> None:
            nonlocal done_before
            done_before = done
            if done >= size // 2:
                scope.cancel()

        await me.fetch(ref(file_cid(data), len(data)), progress=watch)
    assert scope.cancelled_caught and store.path(file_cid(data)) is None
    net.kill(ME)
    again, _, _ = await net.node(ME, providers=(A,), store=store)
    seen: list[int] = []
    opened = await again.open(ref(file_cid(data), len(data)), progress=lambda done, _: seen.append(done))
    assert opened.path.read_bytes() == data
    assert seen[0] > done_before
    assert len(data) <= me.bytes_fetched + again.bytes_fetched <= len(data) + MAX_WINDOW_BYTES + MIB


async def test_a_truncated_part_is_fetched_again_where_it_is_missing(net: Network) -> None:
    data = noise(10 * MIB)
    await net.node(A, data)
    me, store, _ = await net.node(ME, providers=(A,))
    with trio.CancelScope() as scope:
        await me.fetch(ref(file_cid(data), len(data)), progress=lambda done, _: scope.cancel())
    (part,) = store.folder.glob("files/*.part")
    with part.open("r+b") as file:
        file.truncate(MIB // 2)
    assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data


async def test_full_quota_is_the_persons_to_solve(net: Network, tmp_path: Path) -> None:
    data = noise(3 * MIB)
    await net.node(A, data)
    me, _, _ = await net.node(ME, providers=(A,), store=BlobStore(tmp_path / "small", MIB))
    with pytest.raises(DiskError, match=r"content\.quota"):
        await me.fetch(ref(file_cid(data), len(data)))
    assert me.bytes_fetched == 0


async def test_a_wrong_size_is_the_publishers_mistake(net: Network) -> None:
    data = noise(3 * MIB)
    await net.node(A, data)
    me, _, _ = await net.node(ME, providers=(A,))
    with pytest.raises(ModelError, match="wrong size"):
        await me.fetch(ref(file_cid(data), len(data) - 1))
    assert me.bad_providers() == {}


async def test_nobody_has_it(net: Network) -> None:
    cid = file_cid(noise(2 * MIB))
    await net.node(A)
    me, _, _ = await net.node(ME, providers=(A, B), patience=4)
    with pytest.raises(ContentUnavailable) as caught:
        await me.fetch(ref(cid, 2 * MIB))
    text = str(caught.value)
    assert cid in text and "does not have it" in text and "not reachable" in text
    lonely, _, _ = await net.node(C, patience=0.2)
    with pytest.raises(ContentUnavailable, match="does not have it"):
        await lonely.fetch(ref(cid, 2 * MIB))
    with pytest.raises(ContentUnavailable, match="ask again, or name IPFS nodes that have it"):
        await lonely.block(cid_of(DAG_CBOR, b"a manifest"))


async def test_providers_may_turn_up_later(net: Network) -> None:
    data = noise(3 * MIB)
    known: list[PeerId] = []
    me, _, _ = await net.node(ME, providers=known)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(me.fetch, ref(file_cid(data), len(data)))
        await net.node(A, data)
        known.append(A)


async def test_a_block_passes_on_while_it_is_still_coming_in(net: Network) -> None:
    """Me has the file from B alone, which is itself only fetching it."""
    data = noise(12 * MIB)
    await net.node(A, data)
    b, _, _ = await net.node(B, providers=(A,))
    me, _, _ = await net.node(ME, providers=(B,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(me.fetch, ref(file_cid(data), len(data)))
        nursery.start_soon(b.fetch, ref(file_cid(data), len(data)))
    assert me.fetched_from[B] == me.bytes_fetched >= len(data)
    assert me.bytes_fetched < len(data) + 2 * MIB


async def test_single_blocks(net: Network) -> None:
    _, theirs, _ = await net.node(A)
    cid = theirs.put_block(b"\xa1aa\x01", DAG_CBOR)
    me, ours, _ = await net.node(ME, providers=(A,), patience=4)
    assert await me.block(cid) == b"\xa1aa\x01"
    assert ours.block(cid) == b"\xa1aa\x01"
    assert await me.block(cid) == b"\xa1aa\x01"
    with pytest.raises(ContentUnavailable):
        await me.block(file_cid(b"nobody has this"))


async def test_two_callers_share_one_transfer_and_one_may_leave(net: Network) -> None:
    data = noise(16 * MIB)
    await net.node(A, data)
    me, _, _ = await net.node(ME, providers=(A,))
    started = trio.Event()

    async def impatient() -> None:
        with trio.CancelScope() as scope:

            def leave(_done: int, _size: int) -> None:
                started.set()
                scope.cancel()

            await me.fetch(ref(file_cid(data), len(data)), progress=leave)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        nursery.start_soon(me.fetch, ref(file_cid(data), len(data)))
    assert started.is_set()
    assert me.bytes_fetched < len(data) + MIB


@pytest.mark.parametrize("garbage", [b"\xff" * 20, b"\x05hello", b"\x02\x12\x00"])
async def test_garbage_ends_the_stream_and_nothing_else(net: Network, garbage: bytes) -> None:
    data = noise(2 * MIB)
    await net.node(A, data)
    me, _, _ = await net.node(ME, providers=(A,))
    stream = await (await net.join(net.host(B))).open_stream(ME, PROTOCOL, Lane.BULK)
    await stream.send_all(garbage)
    with pytest.raises(PeerUnreachable):
        await stream.receive_some()
    assert "broke the protocol" in me.bad_providers()[B]
    assert (await me.open(ref(file_cid(data), len(data)))).path.read_bytes() == data


async def test_blocks_that_nobody_wants_are_not_kept(net: Network) -> None:
    me, store, _ = await net.node(ME)
    stream = await (await net.join(net.host(B))).open_stream(ME, PROTOCOL, Lane.BULK)
    block = Message(blocks=(Block(prefix=b"\x01\x55\x12\x20", data=bytes(1000)),))
    for _ in range(200):
        try:
            for part in frame_parts(block):
                await stream.send_all(bytes(part))
        except PeerUnreachable:
            break
    with suppress(PeerUnreachable):
        while await stream.receive_some():
            pass
    assert "not asked for" in me.bad_providers()[B]
    assert store.files() == frozenset()


async def test_a_wish_for_a_foreign_cid_is_answered_politely(net: Network) -> None:
    """IPFS peers may ask for CIDs of other versions and hashes."""
    await net.node(A)
    host = net.host(B)
    heard: list[bytes] = []
    got = trio.Event()

    async def listen(stream: Stream) -> None:
        heard.append(await stream.receive_some())
        got.set()

    host.handle(PROTOCOL, listen)
    await net.join(host)
    stream = await host.open_stream(A, PROTOCOL, Lane.BULK)
    wish = Message(entries=(Entry(cid=b"\x12\x20" + bytes(32), send_dont_have=True), Entry(cid=b"?")))
    for part in frame_parts(wish):
        await stream.send_all(bytes(part))
    await got.wait()
    assert b"\x12\x20" + bytes(32) in heard[0]
