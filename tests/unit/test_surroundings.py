"""What of this machine's network is noticed, and what of its sleep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from meshnode.net.surroundings import ASLEEP_S, LOOK_S, Look, difference, look_around, watch_surroundings

HOME = Look(frozenset({("lo", "127.0.0.1"), ("wlan0", "192.0.2.7")}), frozenset({"lo", "wlan0"}), 1000.0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"clock_s": 1000.0 + LOOK_S + ASLEEP_S - 1}, ""),  # a busy machine
        ({"clock_s": 1000.0 + LOOK_S + 3600}, "asleep for 3600 s"),
        ({"clock_s": 10.0}, ""),  # somebody set the time of day back
        ({"addresses": HOME.addresses | {("eth0", "192.0.2.9")}}, "192.0.2.9 came to eth0"),
        ({"addresses": frozenset({("lo", "127.0.0.1")})}, "192.0.2.7 went from wlan0"),
        ({"up": frozenset({"lo"})}, "wlan0 has no link"),
        ({"up": HOME.up | {"eth0"}}, "eth0 has a link"),
        (
            {"addresses": frozenset({("lo", "127.0.0.1"), ("wlan0", "192.0.2.8")})},
            "192.0.2.8 came to wlan0, 192.0.2.7 went from wlan0",
        ),
    ],
)
def test_what_is_a_change(change: dict[str, object], words: str) -> None:
    assert difference(HOME, replace(HOME, **change)) == words  # type: ignore[arg-type]


def test_this_machine_can_be_looked_at() -> None:
    look = look_around()
    assert any(ip.startswith("127.") for _, ip in look.addresses)
    assert difference(look, look) == ""


async def test_every_change_is_told_once(autojump_clock: MockClock) -> None:
    away = replace(HOME, addresses=frozenset({("lo", "127.0.0.1")}))
    looks = iter([HOME, HOME, away, away, HOME, *[HOME] * 100])
    told: list[str] = []
    with trio.move_on_after(10 * LOOK_S):
        await watch_surroundings(told.append, lambda: next(looks))
    assert told == ["192.0.2.7 went from wlan0", "192.0.2.7 came to wlan0"]
