"""Whether the network around this machine may have changed: addresses came or went, a cable was plugged in, it slept.

Whoever waits between attempts then has reason not to. What nobody on this machine can see (a switch without power)
is not seen here either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil
import trio

LOOK_S: Final = 2.0  # between two looks, of 0.2 ms each
ASLEEP_S: Final = 5.0  # a look that is so late by a clock that never stands still: we slept, or were stopped


@dataclass(frozen=True, slots=True)
class Look:
    """What was to be seen at one moment."""

    addresses: frozenset[tuple[str, str]]  # (interface, IP address)
    up: frozenset[str]  # interfaces that have a link
    clock_s: float  # of a clock that goes on while the machine sleeps


def look_around() -> Look:
    """What is to be seen now."""
    addresses = (
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family != psutil.AF_LINK
    )
    up = (name for name, stats in psutil.net_if_stats().items() if stats.isup)
    # Linux stops the monotonic clock of a machine that sleeps; elsewhere there is only the time of day.
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_REALTIME)
    return Look(frozenset(addresses), frozenset(up), time.clock_gettime(clock))


def difference(before: Look, after: Look) -> str:
    """What has changed between two looks, for people; empty: nothing."""
    asleep = after.clock_s - before.clock_s - LOOK_S
    words = [f"asleep for {asleep:.0f} s"] if asleep > ASLEEP_S else []
    words += [f"{ip} came to {name}" for name, ip in sorted(after.addresses - before.addresses)]
    words += [f"{ip} went from {name}" for name, ip in sorted(before.addresses - after.addresses)]
    words += [f"{name} has a link" for name in sorted(after.up - before.up)]
    words += [f"{name} has no link" for name in sorted(before.up - after.up)]
    return ", ".join(words)


async def watch_surroundings(changed: Callable[[str], None], look: Callable[[], Look] = look_around) -> None:
    """Call `changed` with what has changed, whenever something has, until cancelled."""
    before = look()
    while True:
        await trio.sleep(LOOK_S)
        after = look()
        words = difference(before, after)
        if words:
            changed(words)
        before = after
