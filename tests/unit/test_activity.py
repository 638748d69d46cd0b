"""What is read of the device: its load without our training's, its battery, and since when nobody has typed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from meshnode.activity import Activity, idle_s, rule_of
from meshnode.config.settings import LearnSection
from meshnode.policy.idle import IdleRule


class Machine:
    """What psutil says of a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy = self.idle = 100.0
        self.ours: dict[int, float] = {}
        self.battery: Any = None
        monkeypatch.setattr(psutil, "cpu_times", self.cpu_times)
        monkeypatch.setattr(psutil, "Process", self.process)
        monkeypatch.setattr(psutil, "sensors_battery", lambda: self.battery, raising=False)
        monkeypatch.setattr(psutil, "users", list)

    def cpu_times(self) -> Any:
        kind = type("scputimes", (tuple,), {"idle": self.idle, "iowait": 2.0, "guest": 5.0})
        return kind((self.busy - 5.0, self.idle, 2.0, 5.0, 5.0))  # user with guest, idle, iowait, guest, system

    def process(self, pid: int) -> Any:
        if pid not in self.ours:
            raise psutil.NoSuchProcess(pid)
        return SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=self.ours[pid], system=0.0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_the_load_of_others_since_the_last_look(machine: Machine) -> None:
    activity = Activity()
    assert activity.read().load_percent == 100, "nobody knows yet"
    machine.busy, machine.idle = machine.busy + 3, machine.idle + 7
    assert activity.read().load_percent == pytest.approx(30)
    machine.ours[7] = 40.0
    machine.busy, machine.idle = machine.busy + 10, machine.idle + 10
    activity.read([7])
    machine.busy, machine.idle, machine.ours[7] = machine.busy + 10, machine.idle + 10, 48.0
    assert activity.read([7]).load_percent == pytest.approx(10)
    machine.ours.clear()
    machine.busy, machine.idle = machine.busy + 5, machine.idle + 5
    assert activity.read([7]).load_percent == pytest.approx(50), "ours has ended"
    assert activity.read().load_percent == 100, "no time has passed"


def test_batteries(machine: Machine) -> None:
    activity = Activity()
    assert (activity.read().on_mains, activity.read().battery_percent) == (None, None)
    machine.battery = SimpleNamespace(power_plugged=False, percent=41.6)
    assert (activity.read().on_mains, activity.read().battery_percent) == (False, 42)
    machine.battery = SimpleNamespace(power_plugged=True, percent=100)
    assert activity.read().on_mains is True


def test_the_owner_is_seen_at_terminals(tmp_path: Path) -> None:
    for name, typed in (("pts0", 1000), ("pts1", 1500)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (typed, 0))
    assert idle_s(["pts0", "pts1", None, "gone", "a\0b"], 1600, tmp_path) == 100
    assert idle_s(["pts1"], 1400, tmp_path) == 0, "the clock was set back"
    assert idle_s([None, "gone"], 1600, tmp_path) is None
    assert idle_s([], 1600, tmp_path) is None


def test_the_rule_is_what_the_owner_has_set() -> None:
    assert rule_of(LearnSection()) == IdleRule(
        battery_too=False, battery_floor_percent=60, load_percent=30, owner_idle_s=300, hours=None
    )
    told = LearnSection(power="any", battery=20, load=90, owner_idle=0, hours="22-6:30")
    assert rule_of(told) == IdleRule(
        battery_too=True, battery_floor_percent=20, load_percent=90, owner_idle_s=0, hours=(1320, 390)
    )


def test_this_device_can_be_read() -> None:
    activity = Activity()
    facts = activity.read([os.getpid()])
    assert 0 <= facts.load_percent <= 100 and 0 <= facts.minute < 1440
