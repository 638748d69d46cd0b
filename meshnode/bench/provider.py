"""Processes that serve content to one peer: good, slow, or with wrong bytes. For benchmarks and tests of transfers.

python -m meshnode.bench.provider FOLDER --to PEER --host MODULE:FUNCTION --kind good
"""

from __future__ import annotations

import argparse
import importlib
import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import trio

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ConfigError
from meshnode.core.log import set_up
from meshnode.net.port import Host, Lane, Stream
from meshnode.store.blob_store import BlobStore
from protocols.ids import PeerId

KINDS: Final = ("good", "slow", "corrupt")
SLOW_BYTES_PER_SECOND: Final = 1_000_000
QUOTA_BYTES: Final = 1 << 40
_PIECE_BYTES: Final = 1 << 14


def host_from(name: str) -> Host:
    """A host with a fresh key from the function that `name` (MODULE:FUNCTION) points to.

    Raises ConfigError when there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        make: Callable[[bytes], Host] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--host {name} names no function that makes a host: {error}") from error
    return make(secrets.token_bytes(32))


class CorruptStore(BlobStore):
    """Gives every block with one bit flipped."""

    def read_blocks(self, cids: Sequence[bytes]) -> list[bytes | None]:
        return [data and data[:-1] + bytes((data[-1] ^ 1,)) for data in super().read_blocks(cids)]


class SlowStream:
    """Sends no more than SLOW_BYTES_PER_SECOND."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def send_all(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            await trio.sleep(len(piece) / SLOW_BYTES_PER_SECOND)
            await self._stream.send_all(piece)


class SlowHost:
    """A host whose outgoing streams are slow."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    async def open_stream(self, peer: PeerId, protocol: str, lane: Lane = Lane.CONTROL) -> Stream:
        return cast(Stream, SlowStream(await self._host.open_stream(peer, protocol, lane)))


class Provider:
    """A running process that serves a content folder. It ends when we do: its input closes."""

    def __init__(self, host: str, folder: Path, fetcher: PeerId, kind: str = "good") -> None:
        """Start it; `ready` waits until it serves."""
        module = (sys.executable, "-m", "meshnode.bench.provider")  # no -P: --host may name a module of this folder
        command = (*module, str(folder), "--to", fetcher, "--host", host, "--kind", kind)
        self.kind = kind
        self.peer = PeerId("")
        self.addresses: list[str] = []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Wait until it serves. Raises ConfigError when the process ended instead."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise ConfigError(f"a {self.kind} provider did not start; what it says stands above")
        hello = json.loads(line)
        self.peer = PeerId(hello["peer"])
        self.addresses = hello["addresses"]

    def stop(self) -> None:
        """Kill it, as after a power cut."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def providers(host: str, folder: Path, fetcher: PeerId, kinds: Sequence[str]) -> Iterator[list[Provider]]:
    """One process per kind, serving this folder to `fetcher`; killed at the end."""
    started: list[Provider] = []
    try:
        started += [Provider(host, folder, fetcher, kind) for kind in kinds]
        for provider in started:
            provider.ready()
        yield started
    finally:
        for provider in started:
            provider.stop()


async def serve(name: str, folder: Path, fetcher: PeerId, kind: str) -> None:
    """The provider process: say who and where we are, serve until the input closes."""
    host = host_from(name)
    if kind == "slow":
        host = cast(Host, SlowHost(host))  # all but open_stream is that of the host
    store = (CorruptStore if kind == "corrupt" else BlobStore)(folder, QUOTA_BYTES)
    service = content_of(host, store, Known(host))
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        host.admit(fetcher, True)
        await nursery.start(service.run)
        hello = json.dumps({"peer": host.peer_id, "addresses": host.addresses})
        await trio.to_thread.run_sync(print, hello)
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m meshnode.bench.provider", description="Serve a content folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", required=True, metavar="PEER")
    parser.add_argument("--host", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--kind", choices=KINDS, default="good")
    options = parser.parse_args()
    set_up(level="error", format="auto")
    trio.run(serve, options.host, options.folder, PeerId(options.to), options.kind)


if __name__ == "__main__":
    main()
