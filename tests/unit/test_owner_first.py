"""When a device does less for the mesh by its owner's rule: reasons, margins, times."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from typing import Any

import psutil
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from meshnode.activity import heat_c, our_processes, owner_rule
from meshnode.config.settings import OwnerSection
from meshnode.config.values import LEAST_RATE, rate
from meshnode.doctor.device_checks import check_owner
from meshnode.doctor.finding import Level
from meshnode.policy.duty import Duty
from meshnode.policy.idle import DeviceFacts
from meshnode.policy.owner_first import EASE_S, OwnerFirst, OwnerRule, can_apply, reason_in, untold
from meshnode.services.content.outbox import Pace
from protocols.bitswap.messages import Block, Message

RULE = OwnerRule(battery_percent=30, heat_c=90, load_percent=50, idle_s=600, hours=(22 * 60, 7 * 60))
NIGHT = 23 * 60


def device(**facts: Any) -> DeviceFacts:
    return DeviceFacts(**{"minute": NIGHT, "on_mains": True, "owner_idle_s": 3600.0, **facts})


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (device(), ""),
        (DeviceFacts(minute=NIGHT), ""),  # a system that tells nothing
        (device(minute=12 * 60), "it works from 22:00 to 7:00 only (owner.hours)"),
        (device(on_mains=False, battery_percent=29), "its battery is at 29 % (owner.battery = 30)"),
        (device(on_mains=False, battery_percent=30), ""),
        (device(on_mains=True, battery_percent=5), ""),
        (device(heat_c=91.0), "it is 91 °C hot (owner.heat = 90)"),
        (device(heat_c=90.0), ""),
        (device(owner_idle_s=599.0), "somebody works on it (owner.idle = 10 min)"),
        (device(load_percent=51.0), "other programs take 51 % of it (owner.load = 50)"),
    ],
)
def test_reasons(facts: DeviceFacts, reason: str) -> None:
    assert reason_in(facts, RULE, RULE) == reason
    assert reason_in(facts, OwnerRule(), RULE) == ""


def test_background_work_stops_at_once_and_serving_after_a_while() -> None:
    first = OwnerFirst(RULE)
    hot = device(heat_c=95.0)
    assert first.look(device(), 0).duty is Duty.FULL
    assert first.look(hot, 20).duty is Duty.PAUSED
    assert first.look(hot, 319).duty is Duty.PAUSED
    assert first.look(hot, 320).duty is Duty.DRAINED
    assert first.look(device(heat_c=88.0), 340).duty is Duty.DRAINED, "not cool enough to count"
    assert first.look(device(heat_c=84.0), 360).duty is Duty.DRAINED
    assert first.look(device(heat_c=84.0), 360 + EASE_S - 1).duty is Duty.DRAINED
    assert first.look(device(heat_c=84.0), 360 + EASE_S).duty is Duty.FULL
    assert first.look(device(heat_c=88.0), 500).duty is Duty.FULL


def test_serving_goes_on_where_the_owner_wants_that() -> None:
    first = OwnerFirst(OwnerRule(heat_c=90, drain_after_s=0))
    assert [first.look(device(heat_c=95.0), at).duty for at in (0, 10_000)] == [Duty.PAUSED] * 2


@given(st.lists(st.tuples(st.integers(1, 400), st.floats(60, 110)), max_size=60))
def test_whatever_comes_there_is_a_rest_between_two_changes(looks: list[tuple[int, float]]) -> None:
    """It never serves less before its time, nor more before the device has been well for long enough."""
    first, now, hot_at, well_at, before = OwnerFirst(OwnerRule(heat_c=90)), 0, None, None, Duty.FULL
    for pause, heat in looks:
        now += pause
        duty = first.look(device(heat_c=heat), now).duty
        if duty > before:
            hot_at = now if before is Duty.FULL else hot_at
            assert hot_at is not None
            assert heat > 85
            assert duty is Duty.PAUSED or now - hot_at >= 300
        well_at = None if heat > 85 else now if well_at is None else well_at
        if duty < before:
            assert duty is Duty.FULL
            assert well_at is not None
            assert now - well_at >= EASE_S
        before = duty


def test_what_a_system_does_not_tell() -> None:
    rule = owner_rule(OwnerSection(idle=5))
    blind = DeviceFacts()
    assert untold(blind, rule) == ("owner.battery", "owner.heat", "owner.idle")
    assert untold(device(battery_percent=50, heat_c=50.0), rule) == ()
    assert not can_apply(blind, owner_rule(OwnerSection()))
    assert can_apply(device(heat_c=50.0), owner_rule(OwnerSection()))
    assert can_apply(blind, owner_rule(OwnerSection(hours="22-7")))
    said = check_owner(untold(blind, rule), ("owner.idle",))
    assert said.level is Level.WARNING
    assert "what owner.idle would need" in said.text
    assert check_owner(untold(blind, rule), ()).level is Level.OK
    assert "owner.heat" in check_owner(untold(blind, rule), ()).text


def test_the_hottest_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    sensor = namedtuple("sensor", "label current high critical")
    read: dict[str, list[Any]] = {
        "coretemp": [sensor("a", 61.0, 100.0, 100.0), sensor("b", 66.0, None, None)],
        "nvme": [sensor("", 80.0, None, None)],
        "acpitz": [sensor("", -273.2, None, None), sensor("", 0.0, None, None)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: read, raising=False)
    assert heat_c() == 66.0
    read.clear()
    assert heat_c() is None
    monkeypatch.delattr(psutil, "sensors_temperatures")
    assert heat_c() is None
    assert our_processes()[0] == psutil.Process().pid


@pytest.mark.parametrize(("text", "speed"), [("2 MB/s", 2_000_000), ("64kB", LEAST_RATE), (0, 0)])
def test_speeds(text: object, speed: int) -> None:
    assert rate(text) == speed


@pytest.mark.parametrize("text", ["fast", "2 MB/h", -1, True, "63 kB/s", None])
def test_speeds_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a speed; write it like 2 MB/s|is less than 64 kB/s"):
        rate(text)


class Wire:
    """A stream that notes when how much came."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, int]] = []

    async def send_all(self, data: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append((trio.current_time(), len(data)))


async def test_answers_to_all_peers_together_keep_to_the_limit(autojump_clock: MockClock) -> None:
    pace, wires = Pace(100_000), [Wire(), Wire(), Wire()]
    message = Message(blocks=(Block(prefix=b"\x01\x55\x12\x20", data=bytes(500_000)),))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for wire in wires:
            nursery.start_soon(pace.write, wire, message)
    times = sorted(at - began for wire in wires for at, _ in wire.sent)
    total = sum(size for wire in wires for _, size in wire.sent)
    assert total >= 1_500_000
    assert times[-1] == pytest.approx((total - 100_000) / 100_000, rel=0.02)  # a second's worth is free
    for wire in wires:
        gaps = [after[0] - before[0] for before, after in zip(wire.sent, wire.sent[1:], strict=False)]
        assert max(gaps) < 1.0, "a peer that gets nothing for 5 s gives us up"


async def test_without_a_limit_nothing_waits(autojump_clock: MockClock) -> None:
    wire, began = Wire(), trio.current_time()
    await Pace(0).write(wire, Message(blocks=(Block(prefix=b"\x01\x55\x12\x20", data=bytes(500_000)),)))
    assert trio.current_time() == began


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_cores_that_a_node_may_use() -> None:
    code = "import os; from meshnode.activity import use_cores; use_cores({}); print(len(os.sched_getaffinity(0)))"
    for most, left in ((1, 1), (0, len(os.sched_getaffinity(0))), (1000, len(os.sched_getaffinity(0)))):
        done = subprocess.run([sys.executable, "-c", code.format(most)], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == str(left), done.stderr
