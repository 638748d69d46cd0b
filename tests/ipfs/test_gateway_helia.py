"""A real trustless gateway, Helia's (@helia/verified-fetch), over HTTP: a file as one CAR, and block by block."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.ipfs.gateway import Gateway
from meshnode.ipfs.source_order import Fallback
from meshnode.services.content import escalation
from meshnode.services.content import outside as search
from meshnode.services.content.service import ContentService
from meshnode.store.blob_store import BlobStore
from protocols.ids import RAW, Cid, cid_of
from protocols.unixfs.builder import file_cid
from tests.ipfs.world import HELIA, NODE, read_line
from tests.refs import ref
from tests.services.test_content import ME, MIB, QUOTA, Network, network, noise

pytestmark = [pytest.mark.ipfs, pytest.mark.slow]

NEEDS = (NODE, HELIA, HELIA.parent / "@helia" / "verified-fetch")


class HeliaGateway:
    """The process behind the URL."""

    def __init__(self, process: trio.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    async def add(self, path: Path) -> Cid:
        return Cid(await self._ask(str(path)))

    async def requests(self) -> int:
        """How many have come so far."""
        return int(await self._ask(""))

    async def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(line).encode() + b"\n")
        with trio.fail_after(60):
            return str(json.loads(await read_line(self.process)))


@asynccontextmanager
async def helia_gateway() -> AsyncIterator[HeliaGateway]:
    """One that holds nothing yet; killed at the end."""
    program = await trio.Path(__file__).with_name("helia").joinpath("gateway.mjs").read_text()
    process = await trio.lowlevel.open_process(
        [str(NODE), "--input-type=module", "--eval", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=HELIA.parents[1],
    )
    try:
        with trio.fail_after(60):
            port = json.loads(await read_line(process))
        yield HeliaGateway(process, port)
    finally:
        process.kill()
        await process.wait()


async def reader(net: Network, gateway: Gateway, folder: str) -> ContentService:
    """A node that knows nobody but this gateway."""
    outside = Fallback([gateway])
    host, store = net.host(ME), BlobStore(net.folder / folder, QUOTA)
    service = content_of(host, store, Known(host), outside=outside)
    await net.nursery.start(service.run)
    return service


async def test_a_file_comes_as_one_car_or_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escalation, "OUTSIDE_S", 0.0)
    data = noise(180 * MIB + 1)  # two levels of inner nodes
    health = Health()
    (tmp_path / "file").write_bytes(data)
    async with helia_gateway() as there, network(tmp_path) as net:
        cid = await there.add(tmp_path / "file")
        assert cid == file_cid(data)
        gateway = Gateway(there.url, health)
        await net.nursery.start(gateway.run)
        seconds = []
        for folder, smallest, most in (("car", MIB, 1), ("blocks", 1 << 40, 184)):
            monkeypatch.setattr(search, "TREE_BYTES", smallest)
            me = await reader(net, gateway, folder)
            before, began = await there.requests(), time.monotonic()
            opened = await me.open(ref(cid, len(data)))
            seconds.append(time.monotonic() - began)
            assert opened.path.read_bytes() == data
            assert await there.requests() - before == most
        car, blocks = (len(data) / 1e6 / each for each in seconds)
        print(f"\none CAR {car:.0f} MB/s, block by block {blocks:.0f} MB/s")
    assert health.current() == []


async def test_what_it_does_not_have_is_no_reason_for_alarm(tmp_path: Path) -> None:
    health = Health()
    async with helia_gateway() as there, network(tmp_path) as net:
        gateway = Gateway(there.url, health, seconds=3)
        await net.nursery.start(gateway.run)
        with trio.fail_after(30), pytest.raises(ContentUnavailable):
            await Fallback([gateway]).block(cid_of(RAW, b"nobody has this"))
        with trio.fail_after(30), pytest.raises(ContentUnavailable):
            await Fallback([gateway]).tree(file_cid(noise(5 * MIB)), 5 * MIB, _none)
    assert health.current() == []


async def _none(cid: bytes, block: bytes) -> None:
    raise AssertionError("it has nothing")
