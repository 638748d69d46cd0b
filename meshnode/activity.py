"""How busy this device and its owner are, read with psutil: the facts that `policy/idle.py` judges."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from meshnode.config.settings import LearnSection, OwnerSection
from meshnode.config.values import hours_of
from meshnode.policy.idle import DeviceFacts, IdleRule
from meshnode.policy.owner_first import OwnerRule

_TERMINALS: Final = Path("/dev")
_WHOLE: Final = 100.0
_PROCESSORS: Final = frozenset(  # as Linux names their sensors; disks and batteries have limits of their own
    ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "acpitz", "x86_pkg_temp")
)
_COLDEST_C, _HOTTEST_C = 0.0, 150.0


class Activity:
    """Reads the facts. Loads are averages since the reading before, so the first one knows none and says 100 %."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        """`wall`: UTC seconds, as file times are."""
        self._wall = wall
        self._before: tuple[float, float, dict[int, float]] | None = None  # busy, all, ours; CPU seconds so far

    def read(self, ours: Collection[int] = ()) -> DeviceFacts:
        """The facts now. `ours`: process ids whose load does not count."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        local = time.localtime(self._wall())
        return DeviceFacts(
            on_mains=None if battery is None else bool(battery.power_plugged),
            battery_percent=None if battery is None else round(battery.percent),
            heat_c=heat_c(),
            load_percent=self._load_percent(ours),
            owner_idle_s=idle_s((user.terminal for user in psutil.users()), self._wall()),
            minute=local.tm_hour * 60 + local.tm_min,
        )

    def _load_percent(self, ours: Collection[int]) -> float:
        times = psutil.cpu_times()
        twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user and nice, too
        total = float(sum(times) - twice)
        busy = float(total - times.idle - getattr(times, "iowait", 0.0))
        training = {pid: seconds for pid in ours if (seconds := _cpu_s(pid)) is not None}
        before, self._before = self._before, (busy, total, training)
        if before is None or total <= before[1]:
            return _WHOLE
        own = sum(seconds - before[2].get(pid, 0.0) for pid, seconds in training.items())
        return min(_WHOLE, max(0.0, _WHOLE * (busy - before[0] - own) / (total - before[1])))


def rule_of(learn: LearnSection) -> IdleRule:
    """What the owner has set, as the rule takes it."""
    return IdleRule(
        battery_too=learn.power == "any",
        battery_floor_percent=learn.battery,
        load_percent=learn.load,
        owner_idle_s=60.0 * learn.owner_idle,
        hours=hours_of(learn.hours),
    )


def owner_rule(owner: OwnerSection) -> OwnerRule:
    """What the owner has set, as the rule takes it."""
    return OwnerRule(
        battery_percent=owner.battery,
        heat_c=owner.heat,
        load_percent=owner.load,
        idle_s=60.0 * owner.idle,
        hours=hours_of(owner.hours),
        drain_after_s=60.0 * owner.drain_after,
    )


def idle_s(terminals: Iterable[str | None], now: float, folder: Path = _TERMINALS) -> float | None:
    """Seconds since somebody typed into one of these terminals, as `w` shows it; None when none can be read.

    Desktops that are used without a terminal are not noticed, and neither are terminals of which the system does not
    tell when they were read.
    """
    read: list[float] = []
    for name in terminals:
        with suppress(OSError, ValueError):  # ValueError: a zero byte
            if name:
                read.append((folder / name).stat().st_atime)
    return max(0.0, now - max(read)) if read else None


def heat_c() -> float | None:
    """The hottest processor; None where the system does not tell, or tells nonsense (a sensor that is not there)."""
    read = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    found = [
        sensor.current
        for chip, sensors in read.items()
        if chip in _PROCESSORS
        for sensor in sensors
        if sensor.current
    ]
    return max((heat for heat in found if _COLDEST_C < heat < _HOTTEST_C), default=None)


def our_processes() -> tuple[int, ...]:
    """This process and everything that it has started."""
    us = psutil.Process()
    return (us.pid, *(child.pid for child in us.children(recursive=True)))


def use_cores(most: int) -> None:
    """Keep this process, and all that it will start, to so many cores; 0: to all that it has. Linux alone can."""
    if most and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:most])


def _cpu_s(pid: int) -> float | None:
    """CPU seconds of a process so far; None when it has ended."""
    try:
        times: Any = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)
