"""How fast content moves between nodes: real sockets, one process per provider, every block verified, fsync at
the end. One provider and three take turns within one run, so that a slow minute of the machine meets both.

    python -m meshnode.bench.content --size-mb 500 --json OUT

Which transport carries it is an option: `--host MODULE:FUNCTION` names a function that makes a host from a
32-byte seed, listening on 127.0.0.1 at a free port.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
import trio

from meshnode.content.blob_store import BlobStore
from meshnode.core.errors import ConfigError
from meshnode.core.log import set_up
from meshnode.net.port import Host
from meshnode.services.content import ContentService
from protocols.ids import Cid, PeerId

BAR_MB_S: Final = 100
BAR_RSS_MB: Final = 64
CONNECT_SECONDS: Final = 30
DEFAULT_HOST: Final = "meshnode.net.libp2p_host:open_host"
_MB: Final = 1_000_000


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


def rss_mb(pid: int) -> float:
    """Resident memory of a process, in units of 10^6 bytes."""
    return float(psutil.Process(pid).memory_info().rss) / _MB


class PeakMemory:
    """The most that each of some processes used while the `with` lasted, sampled every 20 ms."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.peak_mb = {pid: rss_mb(pid) for pid in pids}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for pid in self.peak_mb:
                self.peak_mb[pid] = max(self.peak_mb[pid], rss_mb(pid))


class Provider:
    """A process that serves a content folder to one peer. It ends when we do: its input closes."""

    def __init__(self, host: str, folder: Path, fetcher: PeerId) -> None:
        module = (sys.executable, "-m", "meshnode.bench.content")  # no -P: --host may name a module of this folder
        command = (*module, "--serve", str(folder), "--to", fetcher, "--host", host)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hello = json.loads(self.process.stdout.readline() if self.process.stdout else "")
        self.peer = PeerId(hello["peer"])
        self.addresses: list[str] = hello["addresses"]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def providers(host: str, folder: Path, fetcher: PeerId, count: int) -> Iterator[list[Provider]]:
    started: list[Provider] = []
    try:
        for _ in range(count):
            started.append(Provider(host, folder, fetcher))
        yield started
    finally:
        for provider in started:
            provider.stop()


async def serve(name: str, folder: Path, fetcher: PeerId) -> None:
    """The provider process: say who and where we are, serve until the input closes."""
    host = host_from(name)
    store = BlobStore(folder, 1 << 40)
    service = ContentService(host, store, lambda _: ())
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        host.admit(fetcher, True)
        await nursery.start(service.run)
        hello = json.dumps({"peer": host.peer_id, "addresses": host.addresses})
        await trio.to_thread.run_sync(print, hello)
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


async def fetch_rounds(
    name: str, source: Path, target: Path, cid: Cid, size: int, rounds: int
) -> list[dict[str, Any]]:
    """Fetch `cid` from one and from three providers in turn; a fresh copy each time."""
    out = []
    host = host_from(name)
    store = BlobStore(target, 1 << 40)
    chosen: list[PeerId] = []
    service = ContentService(host, store, lambda _: tuple(chosen))
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        await nursery.start(service.run)
        with providers(name, source, host.peer_id, 3) as started:
            for provider in started:
                host.admit(provider.peer, True)
                with trio.fail_after(CONNECT_SECONDS):
                    await host.connect(provider.peer, provider.addresses)
            for number in range(rounds):
                for count in (1, 3):
                    chosen[:] = [provider.peer for provider in started[:count]]
                    out.append(await _round(service, store, cid, size, started, number, count))
        nursery.cancel_scope.cancel()
    store.close()
    return out


async def _round(
    service: ContentService,
    store: BlobStore,
    cid: Cid,
    size: int,
    started: Sequence[Provider],
    number: int,
    count: int,
) -> dict[str, Any]:
    pids = [os.getpid(), *(provider.process.pid for provider in started)]
    before = {pid: rss_mb(pid) for pid in pids}
    fetched = service.bytes_fetched
    with PeakMemory(pids) as memory:
        start = trio.current_time()
        await service.fetch(cid, size)
        seconds = trio.current_time() - start
    await trio.to_thread.run_sync(store.remove, cid)
    growth = {pid: memory.peak_mb[pid] - before[pid] for pid in pids}
    return {
        "round": number,
        "providers": count,
        "mb_s": round(size / _MB / seconds, 1),
        "wasted_mb": round((service.bytes_fetched - fetched - size) / _MB, 2),
        "fetcher_growth_mb": round(growth[pids[0]], 1),
        "provider_growth_mb": round(max(growth[pid] for pid in pids[1:]), 1),
    }


def measure(size_mb: int, rounds: int, folder: Path, host: str = DEFAULT_HOST) -> dict[str, Any]:
    """Run the whole benchmark below a temporary folder and return its figures (MB are 10^6 bytes)."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        payload = root / "payload"
        with payload.open("wb") as file:
            for _ in range(size_mb):
                file.write(secrets.token_bytes(_MB))
        store = BlobStore(root / "source", 1 << 40)
        cid = store.add_file(payload, pin="bench")
        store.close()
        payload.unlink()
        rows = trio.run(fetch_rounds, host, root / "source", root / "target", cid, size_mb * _MB, rounds)
        shutil.rmtree(root / "target")
    one = statistics.median(row["mb_s"] for row in rows if row["providers"] == 1)
    three = statistics.median(row["mb_s"] for row in rows if row["providers"] == 3)
    return {
        "host": host,
        "size_mb": size_mb,
        "one_mb_s": one,
        "three_mb_s": three,
        "ratio": round(three / one, 3),
        "fetcher_growth_mb": max(row["fetcher_growth_mb"] for row in rows),
        "provider_growth_mb": max(row["provider_growth_mb"] for row in rows),
        "wasted_mb": max(row["wasted_mb"] for row in rows),
        "rounds": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshnode.bench.content", description="Content transfer.")
    parser.add_argument("--size-mb", type=int, default=500, help="size of the file in 10^6 bytes (500)")
    parser.add_argument("--rounds", type=int, default=3, help="transfers per number of providers (3)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--host", default=DEFAULT_HOST, help=f"what makes a host ({DEFAULT_HOST})")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_up(level="error", format="auto")
    if options.serve is not None:
        trio.run(serve, options.host, options.serve, PeerId(options.to))
        return 0
    result = measure(options.size_mb, options.rounds, options.folder, options.host)
    sys.stdout.write(
        f"one provider {result['one_mb_s']:.0f} MB/s   three {result['three_mb_s']:.0f} MB/s   memory grew by "
        f"{result['fetcher_growth_mb']:.0f} MB (fetcher), {result['provider_growth_mb']:.0f} MB (provider)\n"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    met = result["one_mb_s"] >= BAR_MB_S and result["fetcher_growth_mb"] < BAR_RSS_MB
    return 0 if met and result["provider_growth_mb"] < BAR_RSS_MB else 1


if __name__ == "__main__":
    sys.exit(main())
