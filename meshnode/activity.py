"""How busy this device and its owner are, read with psutil: the facts that `policy/idle.py` judges."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from meshnode.config.settings import LearnSection
from meshnode.config.values import hours_of
from meshnode.policy.idle import DeviceFacts, IdleRule

_TERMINALS: Final = Path("/dev")
_WHOLE: Final = 100.0


class Activity:
    """Reads the facts. Loads are averages since the reading before, so the first one knows none and says 100 %."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        """`wall`: UTC seconds, as file times are."""
        self._wall = wall
        self._before: tuple[float, float, dict[int, float]] | None = None  # busy, all, ours; CPU seconds so far

    def read(self, ours: Collection[int] = ()) -> DeviceFacts:
        """The facts now. `ours`: process ids of our training, whose load does not count."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        local = time.localtime(self._wall())
        return DeviceFacts(
            on_mains=None if battery is None else bool(battery.power_plugged),
            battery_percent=None if battery is None else round(battery.percent),
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


def _cpu_s(pid: int) -> float | None:
    """CPU seconds of a process so far; None when it has ended."""
    try:
        times: Any = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)
