"""How much a device does for the mesh: all of it, no background work, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class Duty(IntEnum):
    """The higher, the less it does; of two that are asked for at once the higher counts."""

    FULL = 0
    PAUSED = 1  # no learning, no copies for others, nothing published; it serves its layers
    DRAINED = 2  # it gives its layers to others as well

    @property
    def word(self) -> str:
        """As adverts and `status` have it."""
        return WORDS[self]

    @property
    def background(self) -> bool:
        """Whether it learns, makes copies and publishes."""
        return self is Duty.FULL

    @property
    def serves(self) -> bool:
        """Whether it holds layers."""
        return self is not Duty.DRAINED


WORDS: Final = {Duty.FULL: "full", Duty.PAUSED: "paused", Duty.DRAINED: "drained"}
_BY_TAG: Final = {WORDS[duty]: duty for duty in (Duty.PAUSED, Duty.DRAINED)}


def duty_of(tags: Iterable[str]) -> Duty:
    """What an advert with these tags says."""
    return max((_BY_TAG[tag] for tag in tags if tag in _BY_TAG), default=Duty.FULL)


def tags_for(duty: Duty, tags: Iterable[str]) -> tuple[str, ...]:
    """An advert's tags, with this duty in place of the one before."""
    others = tuple(tag for tag in tags if tag not in _BY_TAG)
    return others if duty is Duty.FULL else (*others, duty.word)


@dataclass(frozen=True, slots=True)
class Standing:
    """What holds at the moment, and why: a sentence without a full stop, empty for FULL."""

    duty: Duty = Duty.FULL
    why: str = ""
