"""Injured inputs for every reader of bytes from outside: none but the documented errors, bounded time and memory.

    python -m tests.fuzz --inputs 10000000 --seed 1

Each target runs in a process of its own, a core each. The first exception that is not a `MeshError` ends the run;
its input is then in build/fuzz, and `--again FILE --target NAME` repeats it. What a target takes is injured again, so
that inputs get past the first checks.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from protocols.errors import MeshError
from tests.fuzz.mutate import spliced
from tests.fuzz.targets import TARGETS, Ready, Take

__all__ = ["Crash", "Ran", "Take", "main", "run", "runnable", "take"]

POOL: Final = 400  # inputs that are kept
LARGE: Final = 1 << 11  # bytes; such inputs cost time, so they are taken less often
MAX_SEED: Final = 1 << 15  # bytes of a kept input
CPU_S: Final = 10.0  # of one input; the slowest takes milliseconds
WARM_UP: Final = 2000  # inputs after which a target has loaded what it needs
GROWTH_KB: Final = 192 << 10  # resident memory at its highest, after the warm-up
MAX_WORDS: Final = 8000  # characters of a refusal: whoever sends nonsense must not fill logs with it
FRESH: Final = 0.15  # part of the inputs that begin with a new valid one
SPLICED: Final = 0.05
FOLDER: Final = Path("build/fuzz")


class TooSlow(BaseException):
    """One input has taken more than `CPU_S`. No `Exception`, so that nothing but the harness catches it."""


class Crash(Exception):
    """An input with which a target did what it may not do."""

    def __init__(self, target: str, data: bytes, words: str) -> None:
        super().__init__(target, data, words)
        self.target, self.data, self.words = target, data, words

    def __str__(self) -> str:
        return f"{self.target}: {self.words}\n{len(self.data)} bytes: {self.data[:1000].hex()}"


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of one target."""

    name: str
    inputs: int
    taken: int  # accepted by it
    seconds: float
    peak_kb: int  # resident
    grown_kb: int  # of it, after the warm-up


def _too_slow(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise TooSlow


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _next(ready: Ready, pool: list[bytes], chance: random.Random) -> bytes:
    if ready.fresh is not None and chance.random() < FRESH:
        data = ready.fresh(chance)
        if chance.random() < 0.3:
            return data
    else:
        data = chance.choice(pool)
        if len(data) > LARGE and chance.random() > 0.05:
            data = min(data, chance.choice(pool), chance.choice(pool), key=len)
    if chance.random() < SPLICED:
        data = spliced(data, chance.choice(pool), chance)
    return chance.choice(ready.injure)(data, chance)


def run(name: str, seed: int, *, inputs: int = 1 << 62, seconds: float = float("inf")) -> Ran:
    """Run one target in this process. Raises Crash."""
    chance = random.Random(f"{name} {seed}")
    counts = dict.fromkeys(("inputs", "taken"), 0)
    before = signal.signal(signal.SIGPROF, _too_slow)
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            ready = TARGETS[name].make(Path(folder))
            pool, warm_kb, begin = list(ready.seeds), 0, time.monotonic()
            while counts["inputs"] < inputs and time.monotonic() - begin < seconds:
                data = _next(ready, pool, chance)
                counts["inputs"] += 1
                signal.setitimer(signal.ITIMER_PROF, CPU_S)
                if take(name, ready, data):
                    counts["taken"] += 1
                    if len(data) <= MAX_SEED and chance.random() < 0.05:
                        pool.append(data)
                        if len(pool) > POOL:
                            del pool[chance.randrange(len(ready.seeds), len(pool))]
                if counts["inputs"] == WARM_UP:
                    warm_kb = _peak_kb()
                elif warm_kb and counts["inputs"] % 1000 == 0 and _peak_kb() - warm_kb > GROWTH_KB:
                    raise Crash(name, data, f"memory has grown by {_peak_kb() - warm_kb} kB")
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    peak = _peak_kb()
    return Ran(name, **counts, seconds=time.monotonic() - begin, peak_kb=peak, grown_kb=peak - (warm_kb or peak))


def take(name: str, ready: Ready, data: bytes) -> bool:
    """Whether the target took it; refused properly is False. Raises Crash."""
    try:
        return bool(ready.take(data))
    except MeshError as error:
        if len(str(error)) > MAX_WORDS:
            raise Crash(name, data, f"a refusal of {len(str(error))} characters") from None
        return False
    except TooSlow:
        raise Crash(name, data, f"more than {CPU_S:.0f} s of processor time") from None
    except BaseException:  # noqa: BLE001 - a panic of a library in Rust is no Exception
        raise Crash(name, data, traceback.format_exc()) from None


def _one(job: tuple[str, int, int]) -> Ran | Crash:
    name, seed, inputs = job
    try:
        return run(name, seed, inputs=inputs)
    except Crash as crash:
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / f"{name.replace(' ', '-')}-{seed}"
        path.write_bytes(crash.data)
        return Crash(crash.target, crash.data, f"{crash.words}(saved as {path})")


def runnable() -> list[str]:
    """Targets whose packages are installed."""
    return [name for name, one in TARGETS.items() if all(importlib.util.find_spec(need) for need in one.needs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--again", type=Path, metavar="FILE", help="give this input to the one --target")
    words = parser.parse_args()
    if words.again is not None:
        (name,) = words.target
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            print("taken" if take(name, TARGETS[name].make(Path(folder)), words.again.read_bytes()) else "refused")
        return 0
    names = words.target or runnable()
    shares = sum(TARGETS[name].share for name in names)
    jobs = [(name, words.seed, -(-words.inputs * TARGETS[name].share // shares)) for name in names]
    print(f"seed {words.seed}", flush=True)
    began, total = time.monotonic(), 0
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        for ran in pool.imap_unordered(_one, jobs, chunksize=1):
            if isinstance(ran, Crash):
                print(ran, file=sys.stderr)
                return 1
            total += ran.inputs
            print(
                f"{ran.name:18} {ran.inputs:9,} inputs, {ran.taken:9,} taken, {ran.seconds:6.0f} s, "
                f"{ran.peak_kb >> 10:4} MB at most, {ran.grown_kb >> 10} MB after the warm-up",
                flush=True,
            )
    print(f"{total:,} inputs in {time.monotonic() - began:.0f} s, 0 crashes")
    return 0
