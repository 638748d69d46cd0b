"""How fast content moves between nodes: real sockets, one process per provider, every block verified, fsync at
the end. The cases take turns within one run, so that a slow minute of the machine meets all of them.

    python -m meshnode.bench.content --size-mb 500 --json OUT

Which transport carries it is an option: `--host MODULE:FUNCTION` names a function that makes a host from a
32-byte seed, listening on 127.0.0.1 at a free port.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import trio

from meshnode.bench.known import Known, content_of
from meshnode.bench.machine import line, machine
from meshnode.bench.provider import QUOTA_BYTES, Provider, host_from, providers
from meshnode.core.log import set_up
from meshnode.net.port import Host
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.stalls import DOUBT_S
from protocols.ids import Cid, PeerId
from protocols.manifest.messages import FileRef
from protocols.unixfs.builder import Builder

BAR_MB_S: Final = 100
BAR_RSS_MB: Final = 64
BAR_TROUBLE: Final = 1.3  # times as long as from the good provider alone
SETTLE_S: Final = 2.0  # what a new process still does in the background would be counted, once per provider
CONNECT_S: Final = 30
DEFAULT_HOST: Final = "meshnode.net.libp2p.host:open_host"
_MB: Final = 1_000_000


class Case(NamedTuple):
    """Who serves one transfer. The providers are named to the fetcher in this order."""

    kinds: tuple[str, ...]  # as in meshnode.bench.provider
    kill_at: float = 1.0  # part of the file after which the first provider is killed; 1: never


CASES: Final = {
    "one": Case(("good",)),
    "three": Case(("good", "good", "good")),
    "trouble": Case(("corrupt", "slow", "good")),
    "killed": Case(("good", "good", "good"), kill_at=0.4),
}


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
                with suppress(psutil.NoSuchProcess):  # killed, as the case asks
                    self.peak_mb[pid] = max(self.peak_mb[pid], rss_mb(pid))


class Transfers:
    """One fetching node, which meets new providers in every transfer."""

    def __init__(self, host_name: str, source: Path, target: Path, cid: Cid, size: int, settle_s: float) -> None:
        """
        Args:
          source: the content folder that providers serve; it holds the file `cid` of `size` bytes.
          settle_s: seconds between connecting and the transfer; see `SETTLE_S`.
        """
        self._settle_s = settle_s
        self._host_name = host_name
        self._source = source
        self._cid = cid
        self._size = size
        self._host: Host = host_from(host_name)
        self._store = BlobStore(target, QUOTA_BYTES)
        self._chosen: list[PeerId] = []
        self._service = content_of(self._host, self._store, Known(self._host, self._chosen))

    async def run(self, cases: Sequence[str], rounds: int) -> list[dict[str, Any]]:
        """Every case once a round, each round beginning with another one."""
        rows = []
        async with trio.open_nursery() as nursery:
            await nursery.start(self._host.run)
            await nursery.start(self._service.run)
            for number in range(rounds):
                turn = number % len(cases)
                for name in (*cases[turn:], *cases[:turn]):
                    rows.append({"round": number, "case": name, **await self._transfer(CASES[name])})
            nursery.cancel_scope.cancel()
        self._store.close()
        return rows

    async def _transfer(self, case: Case) -> dict[str, Any]:
        with providers(self._host_name, self._source, self._host.peer_id, case.kinds) as started:
            for provider in started:
                self._host.admit(provider.peer, True)
                with trio.fail_after(CONNECT_S):
                    await self._host.connect(provider.peer, provider.addresses)
            self._chosen[:] = [provider.peer for provider in started]
            await trio.sleep(self._settle_s)
            row = await self._measure(case, started)
            for provider in started:
                await self._host.disconnect(provider.peer, "the transfer has ended")
        return row

    async def _measure(self, case: Case, started: Sequence[Provider]) -> dict[str, Any]:
        def watch(done: int, size: int) -> None:
            if done >= case.kill_at * size and case.kill_at < 1:
                started[0].process.kill()

        pids = [os.getpid(), *(provider.process.pid for provider in started)]
        before = {pid: rss_mb(pid) for pid in pids}
        fetched = self._service.bytes_fetched
        with PeakMemory(pids) as memory:
            start = trio.current_time()
            opened = await self._service.open(FileRef(cid=self._cid, size=self._size), progress=watch)
            seconds = trio.current_time() - start
        with opened as path:
            right = await trio.to_thread.run_sync(_cid_of, path) == self._cid
        await trio.to_thread.run_sync(self._store.remove, self._cid)
        if "corrupt" in case.kinds:
            await trio.sleep(DOUBT_S + 0.5)  # after which a peer is judged whose bytes hash to nothing
        dropped = self._service.bad_providers()
        growth = {pid: memory.peak_mb[pid] - before[pid] for pid in pids}
        return {
            "seconds": round(seconds, 3),
            "mb_s": round(self._size / _MB / seconds, 1),
            "right": right,
            "dropped": [provider.kind for provider in started if provider.peer in dropped],
            "killed": started[0].process.poll() is not None,
            "wasted_mb": round((self._service.bytes_fetched - fetched - self._size) / _MB, 2),
            "fetcher_growth_mb": round(growth[pids[0]], 1),
            "provider_growth_mb": round(max(growth[pid] for pid in pids[1:]), 1),
        }


def _cid_of(path: Path) -> Cid:
    builder = Builder()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            builder.update(piece)
    return builder.finish().root


def measure(
    size_mb: int,
    rounds: int,
    folder: Path,
    host: str = DEFAULT_HOST,
    cases: Sequence[str] = tuple(CASES),
    settle_s: float = SETTLE_S,
) -> dict[str, Any]:
    """Run the whole benchmark below a temporary folder and return its figures (MB are 10^6 bytes).

    A ratio is the median of the ratios within the rounds: time of a case by the time of "one".
    """
    facts = machine()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        payload = root / "payload"
        with payload.open("wb") as file:
            for _ in range(size_mb):
                file.write(secrets.token_bytes(_MB))
        store = BlobStore(root / "source", QUOTA_BYTES)
        cid = store.add_file(payload, pin="bench")
        store.close()
        payload.unlink()
        transfers = Transfers(host, root / "source", root / "target", cid, size_mb * _MB, settle_s)
        rows = trio.run(transfers.run, tuple(cases), rounds)
    summary = {name: _summary([row for row in rows if row["case"] == name], rows) for name in cases}
    return {"machine": facts, "host": host, "size_mb": size_mb, "cases": summary, "rounds": rows}


def _summary(mine: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    alone = {row["round"]: row["seconds"] for row in rows if row["case"] == "one"}
    ratios = [row["seconds"] / alone[row["round"]] for row in mine if row["round"] in alone]
    return {
        "mb_s": statistics.median(row["mb_s"] for row in mine),
        "time_to_one": round(statistics.median(ratios), 3) if ratios else None,
        "right": all(row["right"] for row in mine),
        "dropped": sorted({kind for row in mine for kind in row["dropped"]}),
        "wasted_mb": max(row["wasted_mb"] for row in mine),
        "fetcher_growth_mb": max(row["fetcher_growth_mb"] for row in mine),
        "provider_growth_mb": max(row["provider_growth_mb"] for row in mine),
    }


def misses(result: dict[str, Any]) -> list[str]:
    """The bars that a result of `measure` misses, as sentences."""
    out = []
    for name, case in result["cases"].items():
        if not case["right"]:
            out.append(f"{name}: a file came with wrong bytes")
        if case["dropped"] != (["corrupt"] if "corrupt" in CASES[name].kinds else []):
            out.append(f"{name}: dropped were {case['dropped'] or 'none'}")
        for what in ("fetcher", "provider"):
            if case[f"{what}_growth_mb"] >= BAR_RSS_MB:
                out.append(f"{name}: memory of a {what} grew by {case[f'{what}_growth_mb']} MB, bar {BAR_RSS_MB}")
    cases = result["cases"]
    if "one" in cases and cases["one"]["mb_s"] < BAR_MB_S:
        out.append(f"one: {cases['one']['mb_s']} MB/s, bar {BAR_MB_S}")
    ratio = cases.get("trouble", {}).get("time_to_one")
    if ratio is not None and ratio > BAR_TROUBLE:
        out.append(f"trouble: {ratio} times as long as the good provider alone, bar {BAR_TROUBLE}")
    return out


_MEANING: Final = {
    "one": "one provider",
    "three": "three providers",
    "trouble": "one good, one slow (1 MB/s), one that sends wrong bytes",
    "killed": "three, one killed at 40 %",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshnode.bench.content", description="Content transfer.")
    parser.add_argument("--size-mb", type=int, default=500, help="size of the file in 10^6 bytes (500)")
    parser.add_argument("--rounds", type=int, default=5, help="transfers per case (5); the medians are shown")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="default: all")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--host", default=DEFAULT_HOST, help=f"what makes a host ({DEFAULT_HOST})")
    options = parser.parse_args(arguments)
    set_up(level="error", format="auto")
    result = measure(options.size_mb, options.rounds, options.folder, options.host, options.cases)
    out = [line(result["machine"])]
    for name, case in result["cases"].items():
        ratio = "" if case["time_to_one"] is None else f"   {case['time_to_one']:5.2f} times the time of one"
        out.append(
            f"{_MEANING[name]:40} {case['mb_s']:6.0f} MB/s{ratio}   memory +{case['fetcher_growth_mb']:.0f} MB "
            f"(fetcher), +{case['provider_growth_mb']:.0f} MB (provider)"
        )
    missed = misses(result)
    sys.stdout.write("\n".join([*out, *(f"MISSED {sentence}" for sentence in missed)]) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
