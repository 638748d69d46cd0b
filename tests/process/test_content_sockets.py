"""Content between processes over TCP sockets: kill -9 of either side, memory, and the benchmark itself.

The host here is the least that the port asks for (one TCP connection per stream, no encryption); what is under
test is the store and the service in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.bench import content as bench
from meshnode.bench.known import Known, content_of
from meshnode.bench.provider import Provider, host_from, providers
from meshnode.core.errors import ConfigError, PeerUnreachable
from meshnode.core.log import set_up
from meshnode.net.port import Handler, Lane, PeerEvent
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.ledger import MAX_WINDOW_BYTES
from protocols.errors import MeshError
from protocols.ids import Cid, PeerId
from protocols.unixfs.builder import file_cid
from tests.refs import ref

pytestmark = pytest.mark.process

HOST = "tests.process.test_content_sockets:open_host"
ROOT = Path(__file__).parents[2]
MIB = 1 << 20


class SocketStream:
    def __init__(self, peer: PeerId, wire: trio.SocketStream) -> None:
        self.peer = peer
        self._wire = wire

    async def send_all(self, data: bytes | memoryview) -> None:
        try:
            await self._wire.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerUnreachable(f"{self.peer} is gone", peer=self.peer) from error

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        try:
            return bytes(await self._wire.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerUnreachable(f"{self.peer} is gone", peer=self.peer) from error

    async def aclose(self) -> None:
        await self._wire.aclose()


class SocketHost:
    def __init__(self, seed: bytes) -> None:
        self.peer_id = PeerId(f"peer-{seed.hex()[:16]}")
        self.addresses: tuple[str, ...] = ()
        self.guests: tuple[PeerId, ...] = ()
        self._handlers: dict[str, Handler] = {}
        self._ports: dict[PeerId, int] = {}
        self._port = 0

    def handle(self, protocol: str, handler: Handler, *, open_to_strangers: bool = False) -> None:
        self._handlers[protocol] = handler

    def admit(self, peer: PeerId, admitted: bool) -> None:
        assert admitted

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        self._events, receiver = trio.open_memory_channel[PeerEvent](10)
        return receiver

    def guest_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        self._guest_events, receiver = trio.open_memory_channel[PeerEvent](0)
        return receiver

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, self._accept, 0, host="127.0.0.1"))
            self._port = listener.socket.getsockname()[1]
            self.addresses = (str(self._port),)
            task_status.started()

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        await trio.lowlevel.checkpoint()
        self._ports.pop(peer, None)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        self._ports[peer] = int(addresses[0])

    async def _accept(self, wire: trio.SocketStream) -> None:
        line = b""
        while not line.endswith(b"\n"):
            line += await wire.receive_some(1)
        peer, port, protocol = json.loads(line)
        self._ports[peer] = port
        try:
            await self._handlers[protocol](SocketStream(peer, wire))  # type: ignore[arg-type]
        except MeshError:
            await wire.aclose()

    async def open_stream(self, peer: PeerId, protocol: str, lane: Lane = Lane.CONTROL) -> SocketStream:
        try:
            wire = await trio.open_tcp_stream("127.0.0.1", self._ports[peer])
        except (OSError, KeyError) as error:
            raise PeerUnreachable(f"{peer} can't be reached: {error}", peer=peer) from error
        await wire.send_all(json.dumps([self.peer_id, self._port, protocol]).encode() + b"\n")
        return SocketStream(peer, wire)


def open_host(seed: bytes) -> SocketHost:
    return SocketHost(seed)


async def fetch(folder: Path, cid: Cid, size: int, fetcher: str, known: dict[str, list[str]]) -> None:
    """The fetching process: one line per step of progress, one at the end."""
    host = SocketHost(b"")
    host.peer_id = PeerId(fetcher)
    store = BlobStore(folder, 1 << 40)
    peers = tuple(PeerId(peer) for peer in known)
    service = content_of(host, store, Known(host, peers))  # type: ignore[arg-type]

    def say(**facts: object) -> None:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()

    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        await nursery.start(service.run)
        for peer, addresses in known.items():
            await host.connect(PeerId(peer), addresses)
        await service.fetch(ref(cid, size), progress=lambda done, _: say(done=done))
        say(fetched=service.bytes_fetched, bad=service.bad_providers(), by=dict(service.fetched_from))
        nursery.cancel_scope.cancel()


class Fetcher:
    def __init__(self, folder: Path, cid: Cid, size: int, providers: Sequence[Provider]) -> None:
        known = json.dumps({provider.peer: provider.addresses for provider in providers})
        command = [sys.executable, "-m", __name__, str(folder), cid, str(size), FETCHER, known]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


FETCHER = PeerId("the-fetcher")


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, bytes]:
    data = os.urandom(80 * MIB)
    (tmp_path / "payload").write_bytes(data)
    store = BlobStore(tmp_path / "source", 1 << 40)
    store.add_file(tmp_path / "payload", pin="test")
    store.close()
    return tmp_path / "source", data


def test_a_fetch_killed_at_half_goes_on_from_there(source: tuple[Path, bytes], tmp_path: Path) -> None:
    folder, data = source
    cid, target = file_cid(data), tmp_path / "target"
    with providers(HOST, folder, FETCHER, ["good"]) as started:
        first = Fetcher(target, cid, len(data), started)
        done = next(line["done"] for line in first.lines() if line["done"] >= len(data) // 2)
        first.end()
        assert first.process.returncode == -9
        second = Fetcher(target, cid, len(data), started)
        *steps, last = second.lines()
        second.process.wait()
    assert second.process.returncode == 0
    assert steps[0]["done"] > done
    assert last["fetched"] <= len(data) - done + MAX_WINDOW_BYTES
    store = BlobStore(target, 1 << 40)
    path = store.path(cid)
    assert path is not None and path.read_bytes() == data
    store.close()


def test_a_killed_provider_is_replaced_by_the_other(source: tuple[Path, bytes], tmp_path: Path) -> None:
    folder, data = source
    with providers(HOST, folder, FETCHER, ["good"] * 2) as started:
        fetcher = Fetcher(tmp_path / "target", file_cid(data), len(data), started)
        last: dict[str, Any] = {}
        for last in fetcher.lines():
            if last.get("done", 0) >= 0.4 * len(data) and started[0].process.poll() is None:
                started[0].stop()
        fetcher.process.wait()
        assert fetcher.process.returncode == 0
        assert started[0].process.returncode == -9
        assert last["bad"] == {}
        assert last["by"][started[1].peer] > 0.2 * len(data)


def test_the_benchmark_measures(tmp_path: Path) -> None:
    result = bench.measure(60, 1, tmp_path, HOST, settle_s=0.0)
    assert [row["case"] for row in result["rounds"]] == ["one", "three", "trouble", "killed"]
    assert [row["killed"] for row in result["rounds"]] == [False, False, False, True]
    for case in result["cases"].values():
        assert case["right"] and case["mb_s"] > 0 and case["wasted_mb"] < 8
    speed = {"one: ", "trouble: "}  # what depends on the machine that the test happens to run on
    assert [words for words in bench.misses(result) if not any(words.startswith(case) for case in speed)] == []
    assert result["cases"]["trouble"]["dropped"] == ["corrupt"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_host_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="--host nowhere:x"):
        host_from("nowhere:x")


if __name__ == "__main__":
    set_up(level="error", format="json")
    trio.run(fetch, Path(sys.argv[1]), Cid(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
