"""Whether a device may train now: what its owner allows, against what the device does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """How a device does. None: it can't tell."""

    on_mains: bool | None = None  # None: it has no battery, as far as anybody knows
    battery_percent: int | None = None
    load_percent: float = 0.0  # of all its cores, by everything but us: our training, or the whole node
    heat_c: float | None = None  # of its hottest processor
    owner_idle_s: float | None = None  # since somebody last typed on it
    minute: int = 0  # of the local day, from 0 to 1439


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleRule:
    """What the owner allows (`[learn]` in config.toml)."""

    battery_too: bool  # otherwise on mains alone
    battery_floor_percent: int
    load_percent: int
    owner_idle_s: float  # 0: whether or not somebody works on it
    hours: tuple[int, int] | None  # [from, to) in minutes of the local day, over midnight when from is the greater


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether it may, and why not: a part of a sentence, with what to change. `why` is empty when it may."""

    may: bool
    why: str = ""


def may_train(facts: DeviceFacts, rule: IdleRule) -> Verdict:
    """The first thing that forbids it, if one does."""
    if rule.hours is not None and not within(facts.minute, rule.hours):
        first, last = (f"{minute // 60}:{minute % 60:02d}" for minute in rule.hours)
        return Verdict(False, f"it trains from {first} to {last} only (learn.hours)")
    if facts.on_mains is False:
        if not rule.battery_too:
            return Verdict(False, 'it runs on its battery (learn.power = "any" would allow that)')
        if facts.battery_percent is not None and facts.battery_percent < rule.battery_floor_percent:
            return Verdict(
                False,
                f"its battery is at {facts.battery_percent} %, below {rule.battery_floor_percent} % (learn.battery)",
            )
    if facts.owner_idle_s is not None and facts.owner_idle_s < rule.owner_idle_s:
        return Verdict(
            False, f"somebody worked on it {facts.owner_idle_s:.0f} s ago; it waits for {rule.owner_idle_s:.0f} s"
        )
    if facts.load_percent > rule.load_percent:
        return Verdict(
            False, f"other work takes {facts.load_percent:.0f} % of it, more than {rule.load_percent} % (learn.load)"
        )
    return Verdict(True)


def within(minute: int, hours: tuple[int, int]) -> bool:
    """Whether a minute of the day lies in [from, to), over midnight when from is the greater."""
    first, last = hours
    return first <= minute < last if first <= last else minute >= first or minute < last
