"""Whether another's adapter may be mixed in: what the mix would take from us, and give us, on a suite that all share.

A node's own samples would not do: where data differ from node to node, every honest adapter looks bad to all others,
and each ends up alone. The samples are drawn after the adapter was committed to, so it can't be made for them.

The mix is judged and not the adapter: where each node knows another part, every one alone is bad at most of the
suite. And it is judged class by class: meeting takes a little from what we know, and gives of what the other knows.
Wrong labels take and give little, which a mean over all samples hides as long as most of them are wrong anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

DRAWN: Final = 128  # samples of the suite for one adapter
GIVEN_BACK: Final = 2 / 3  # of what is taken: honest mixes lose a little more than they gain while all begin
SLACK: Final = 0.03  # natural logarithm for each class: chance, when nodes agree already


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a mix does to the mean losses of the classes, added up."""

    taken: float  # where they become greater
    given: float  # where they become smaller
    classes: int

    @property
    def passes(self) -> bool:
        """Whether enough is given back. Not if any loss is no number."""
        return self.given + SLACK * self.classes >= GIVEN_BACK * self.taken

    @property
    def words(self) -> str:
        """For people."""
        return (
            f"the loss would rise by {self.taken:.3f} on some of the {self.classes} classes of the suite, "
            f"and fall by {self.given:.3f} on others"
        )


def judge(labels: Sequence[str], own: Sequence[float], mix: Sequence[float]) -> Verdict:
    """What a mix does to us.

    Args:
      labels: of the samples that were drawn.
      own: losses of our adapter on them.
      mix: of the mean of another's adapter and ours.
    """
    changes: dict[str, list[float]] = {}
    for label, before, after in zip(labels, own, mix, strict=True):
        changes.setdefault(label, []).append(after - before)
    means = [sum(of) / len(of) for of in changes.values()]
    return Verdict(
        taken=sum(mean for mean in means if not mean <= 0),  # with what is no number
        given=-sum(mean for mean in means if mean < 0),
        classes=len(means),
    )


def draw(labels: Sequence[str], delta: str, round_number: int, count: int = DRAWN) -> tuple[int, ...]:
    """Which samples of the suite judge a delta, ascending: the same for everybody, and of all classes alike.

    Args:
      labels: of all samples of the suite.
      delta: its CID, which nobody can choose together with what it hashes to.
    """
    stem = f"meshnode/gate/1:{round_number}:{delta}:"
    ranked = sorted(range(len(labels)), key=lambda index: sha256(f"{stem}{index}".encode()).digest())
    seen: dict[str, int] = {}
    turns: list[tuple[int, int]] = []  # the first ones of each class, the second ones, and so on
    for place, index in enumerate(ranked):
        turn = seen[labels[index]] = seen.get(labels[index], -1) + 1
        turns.append((turn, place))
    return tuple(sorted(ranked[place] for _, place in sorted(turns)[:count]))
