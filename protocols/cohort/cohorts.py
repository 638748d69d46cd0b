"""Who masks together: computed by everybody alone from the same list of participants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Final, TypeVar

from protocols.ids import PeerId

Peer = TypeVar("Peer", bound=str)
LEAST: Final = 4  # members: of three, two that tell each other theirs know the third's
MOST: Final = 8


def threshold_of(members: int) -> int:
    """How many have to sign the survivors, and reveal: more than two thirds, so two sets never come to pass unless
    more than a third signs both."""
    return 2 * members // 3 + 1


def cohorts_of(order: Sequence[Peer]) -> tuple[tuple[Peer, ...], ...]:
    """The participants of a round, cut into cohorts of about equal size; none when there are fewer than `LEAST`.

    Args:
      order: of the participants, which nobody chose (`protocols.round.schedule.order_of`).
    """
    if len(order) < LEAST:
        return ()
    count = -(-len(order) // MOST)
    cuts = [len(order) * i // count for i in range(count + 1)]
    return tuple(tuple(order[first:last]) for first, last in pairwise(cuts))


@dataclass(frozen=True, slots=True)
class Cohort:
    """One cohort of one round. A member's number is its place in `members`."""

    lineage: bytes  # SHA-256 of the name of the lineage
    round: int
    members: tuple[PeerId, ...]

    @classmethod
    def of(cls, lineage: str, round_number: int, members: tuple[PeerId, ...]) -> Cohort:
        return cls(sha256(lineage.encode()).digest(), round_number, members)

    @property
    def name(self) -> bytes:
        """What all its keys are bound to, 32 bytes."""
        stem = b"meshnode/cohort/1" + self.lineage + self.round.to_bytes(8, "big")
        return sha256(stem + b"".join(peer.encode() + b"\n" for peer in self.members)).digest()

    @property
    def threshold(self) -> int:
        return threshold_of(len(self.members))

    @property
    def everybody(self) -> int:
        """The set of all members. A set is a number whose bit i stands for member i."""
        return (1 << len(self.members)) - 1

    def named(self, members: int) -> tuple[PeerId, ...]:
        return tuple(self.members[i] for i in places(members))


def places(members: int) -> tuple[int, ...]:
    """The numbers of the members of a set, ascending."""
    return tuple(i for i in range(members.bit_length()) if members >> i & 1)
