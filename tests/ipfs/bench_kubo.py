"""How fast a node of ours fetches from a real Kubo, beside a real Kubo that fetches from the same one.

    make bench-ipfs

The file is one of ours (CIDv1, raw leaves, 1 MiB chunks) or one that Kubo has added by default (CIDv0, 256 KiB).
Both sides take turns, each time with an empty store and over a connection that is there already. Ours has ended
when every block is verified and the file is on the disk (fsync). Kubo keeps blocks in its repository and no files, so
it is measured twice: until the repository holds every block ("pin"), and until the file is written ("get").
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import trio

from meshnode.bench.machine import line, machine
from meshnode.core.log import set_up
from protocols.ids import Cid, cid_of_old
from tests.ipfs.test_bitswap_kubo import noise
from tests.ipfs.world import LIBRARY, Kubo, kubo, ours
from tests.refs import ref

MIB: Final = 1 << 20
SIDES: Final = ("mesh", "get", "pin")
KINDS: Final = ("mesh", "kubo")  # who made the file
BAR: Final = 1.0  # our speed by that of Kubo's get, which ends with a file as ours does
CONNECT_S: Final = 30


async def add(folder: Path, seeder: Kubo, kind: str, data: bytes) -> str:
    """Have the seeder hold a file; its CID."""
    if kind == "kubo":
        payload = folder / "payload"
        payload.write_bytes(data)
        name: str = await seeder.call("add", str(payload))
        payload.unlink()
        return name
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        async with ours(Path(temporary) / "store", [seeder], share=True) as node:
            name = node.add(Path(temporary), data)
            await node.met(seeder.peer)
            assert await seeder.call("pin", name) == 0
    return name


async def by_us(folder: Path, seeder: Kubo, name: str, size: int) -> float:
    """Seconds that a new node of ours takes."""
    async with ours(folder, [seeder]) as node:
        await node.met(seeder.peer)
        cid = cid_of_old(name) if name.startswith("Qm") else Cid(name)
        start = trio.current_time()
        opened = await node.content.open(ref(cid, size))
        seconds = trio.current_time() - start
        assert opened.path.stat().st_size == size
        assert node.content.bad_providers() == {}
    return seconds


async def by_kubo(folder: Path, seeder: Kubo, name: str, call: str) -> float:
    """Seconds that a new Kubo takes for this call."""
    arguments = (name,) if call == "pin" else (name, str(folder / "file"))
    async with kubo(folder) as leecher:
        with trio.fail_after(CONNECT_S):
            assert await leecher.call("connect", seeder.addresses[0]) == 0
        start = trio.current_time()
        assert await leecher.call(call, *arguments) == 0
        return trio.current_time() - start


async def measure(folder: Path, sizes_mib: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """MB/s (10^6 bytes) of both sides for each size; the ratio is the median of those within the rounds."""
    out = []
    async with kubo(folder / "seeder") as seeder:
        for kind, mib in itertools.product(KINDS, sizes_mib):
            size = mib * MIB
            name = await add(folder, seeder, kind, noise(size, mib))
            rows = []
            for number in range(rounds):
                seconds = {}
                turn = number % len(SIDES)
                for side in (*SIDES[turn:], *SIDES[:turn]):
                    with tempfile.TemporaryDirectory(dir=folder) as temporary:
                        target = Path(temporary) / side
                        if side == "mesh":
                            seconds[side] = await by_us(target, seeder, name, size)
                        else:
                            seconds[side] = await by_kubo(target, seeder, name, side)
                rows.append({side: round(size / 1e6 / seconds[side], 1) for side in SIDES})
            out.append(
                {
                    "file": kind,
                    "mib": mib,
                    "mb_s": {side: statistics.median(row[side] for row in rows) for side in SIDES},
                    "ratio_to_get": round(statistics.median(row["mesh"] / row["get"] for row in rows), 2),
                    "ratio_to_pin": round(statistics.median(row["mesh"] / row["pin"] for row in rows), 2),
                    "rounds": rows,
                }
            )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ipfs.bench_kubo", description="Fetching from a real Kubo.")
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256], help="sizes of the files in MiB (64 256)")
    parser.add_argument("--rounds", type=int, default=3, help="transfers per side and size (3); medians are shown")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if not LIBRARY.exists():
        sys.stderr.write("There is no real Kubo here; `make bench-ipfs` fetches it from PyPI.\n")
        return 2
    set_up(level="error", format="auto")
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    facts = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = trio.run(measure, Path(folder), options.mib, options.rounds)
    print(line(facts))
    for row in rows:
        speed = row["mb_s"]
        print(
            f"{row['mib']:4d} MiB ({row['file']} file) from a real Kubo: mesh {speed['mesh']:.0f} MB/s; "
            f"Kubo's get {speed['get']:.0f} (ratio {row['ratio_to_get']:.2f}), "
            f"its pin {speed['pin']:.0f} (ratio {row['ratio_to_pin']:.2f})"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": facts, "sizes": rows}, indent=2) + "\n")
    return 0 if all(row["ratio_to_get"] >= BAR for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
