"""Which samples are trained on next: what the model gets wrong, then what it is unsure of, all classes alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from meshnode.policy.randomness import Randomness

SURE: Final = 0.1  # natural logarithm: below this loss a sample that is right has little left to teach


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sample with a label, without its text. `group`: names its class; classes are balanced by it."""

    id: int
    group: bytes
    missed: bool | None  # whether the model gets it wrong; None: nobody has looked
    loss: float | None  # of its label, natural logarithm per token
    used: int  # rounds that have trained on it


def choose(candidates: Iterable[Candidate], count: int, rng: Randomness) -> tuple[int, ...]:
    """The ids of at most `count` candidates, in the order in which they are to be trained on.

    Classes take turns. Within one: mispredicted ones first, then unsure and unknown ones, then the rest; of those the
    less used ones first, so that one sample that is labelled wrongly does not come back every time; then the
    greater loss; the rest is drawn.
    """
    groups: dict[bytes, list[tuple[tuple[int, int, float, float], int]]] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.id):
        key = (_urgency(candidate), candidate.used, -(candidate.loss or 0.0), rng.random())
        groups.setdefault(candidate.group, []).append((key, candidate.id))
    turns = [sorted(groups[group]) for group in sorted(groups)]
    rng.shuffle(turns)
    chosen: list[int] = []
    for place in range(max(map(len, turns), default=0)):
        for turn in turns:
            if len(chosen) >= count:
                return tuple(chosen)
            if place < len(turn):
                chosen.append(turn[place][1])
    return tuple(chosen)


def _urgency(candidate: Candidate) -> int:
    if candidate.missed:
        return 0
    if candidate.missed is None or (candidate.loss or 0.0) >= SURE:
        return 1
    return 2
