"""The owner comes first: when a device has better things to do, background work stops at once, and serving after a
while. What has stopped begins again only when the reason has been gone for some time, by a margin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from meshnode.policy.duty import Duty, Standing
from meshnode.policy.idle import DeviceFacts, within

EASE_S: Final = 120.0  # without a reason before all work goes on: nobody is to give layers away and take them again
BATTERY_MARGIN: Final = 5  # percent above the limit before a battery counts as charged again
HEAT_MARGIN_C: Final = 5.0
LOAD_MARGIN: Final = 0.8  # of the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRule:
    """What the owner wants for the device (`[owner]` in config.toml). A limit of 0: it does not matter."""

    battery_percent: int = 0  # on battery, below this
    heat_c: int = 0  # above this
    load_percent: int = 0  # of all cores, by other programs
    idle_s: float = 0.0  # since somebody last typed
    hours: tuple[int, int] | None = None  # as in `IdleRule`; None: all day
    drain_after_s: float = 300.0  # of a reason, until serving stops as well; 0: it never does

    def eased(self) -> OwnerRule:
        """The rule by which a reason must be gone before it counts as gone."""
        return replace(
            self,
            battery_percent=self.battery_percent and min(100, self.battery_percent + BATTERY_MARGIN),
            heat_c=self.heat_c and max(1, self.heat_c - round(HEAT_MARGIN_C)),
            load_percent=self.load_percent and max(1, round(self.load_percent * LOAD_MARGIN)),
        )


def reason_in(facts: DeviceFacts, rule: OwnerRule, told: OwnerRule) -> str:
    """The first reason to do less, as a part of a sentence; empty when there is none. `told`: what is set."""
    if rule.hours is not None and not within(facts.minute, rule.hours):
        first, last = (f"{minute // 60}:{minute % 60:02d}" for minute in rule.hours)
        return f"it works from {first} to {last} only (owner.hours)"
    if facts.on_mains is False and facts.battery_percent is not None and facts.battery_percent < rule.battery_percent:
        return f"its battery is at {facts.battery_percent} % (owner.battery = {told.battery_percent})"
    if rule.heat_c and facts.heat_c is not None and facts.heat_c > rule.heat_c:
        return f"it is {facts.heat_c:.0f} °C hot (owner.heat = {told.heat_c})"
    if facts.owner_idle_s is not None and facts.owner_idle_s < rule.idle_s:
        return f"somebody works on it (owner.idle = {told.idle_s / 60:.0f} min)"
    if rule.load_percent and facts.load_percent > rule.load_percent:
        return f"other programs take {facts.load_percent:.0f} % of it (owner.load = {told.load_percent})"
    return ""


def untold(facts: DeviceFacts, rule: OwnerRule) -> tuple[str, ...]:
    """Settings that can't have an effect, since the system does not tell what they need: "owner.heat"."""
    return tuple(
        name
        for name, wanted, known in (
            ("owner.battery", rule.battery_percent, facts.battery_percent is not None),
            ("owner.heat", rule.heat_c, facts.heat_c is not None),
            ("owner.idle", rule.idle_s, facts.owner_idle_s is not None),
        )
        if wanted and not known
    )


def can_apply(facts: DeviceFacts, rule: OwnerRule) -> bool:
    """Whether the rule asks for anything that this system tells. Batteries and sensors don't come and go."""
    if rule.hours is not None or rule.load_percent or rule.idle_s:
        return True  # somebody may log in later
    return bool((rule.battery_percent and facts.battery_percent is not None) or (rule.heat_c and facts.heat_c))


class OwnerFirst:
    """Judges one device, look by look."""

    def __init__(self, rule: OwnerRule) -> None:
        self._rule = rule
        self._eased = rule.eased()
        self._since: float | None = None  # a reason has held
        self._gone: float | None = None  # and is gone
        self._standing = Standing()

    def look(self, facts: DeviceFacts, now: float) -> Standing:
        """What holds from now on. `now`: seconds of any clock that does not go back."""
        reason = reason_in(facts, self._rule if self._since is None else self._eased, self._rule)
        if reason:
            self._since = now if self._since is None else self._since
            self._gone = None
            rule = self._rule
            over = rule.drain_after_s and now - self._since >= rule.drain_after_s
            drained = over or self._standing.duty is Duty.DRAINED
            self._standing = Standing(Duty.DRAINED if drained else Duty.PAUSED, reason)
        elif self._since is not None:
            self._gone = now if self._gone is None else self._gone
            if now - self._gone >= EASE_S:
                self._since = self._gone = None
                self._standing = Standing()
        return self._standing
