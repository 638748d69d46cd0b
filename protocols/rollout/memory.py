"""What a node must not forget of roll-outs: kept on its disk as one message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import at
from protocols.rollout.messages import (
    MAX_CANDIDATES,
    MAX_REVOCATIONS,
    MAX_VOTES,
    Candidate,
    Revocation,
    Vote,
)

SHARES: Final = (0, 50, 250, 500, 1000)  # per mille of all nodes that use a candidate, by the step of its roll-out
RELEASED: Final = len(SHARES) - 1
MAX_KNOWN: Final = 16
MAX_GONE: Final = 256
MAX_OPINIONS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A candidate whose roll-out this node has begun."""

    candidate: Candidate = at(1)
    step: int = at(2, high=RELEASED)
    in_use: bool = at(3, default=False)  # it was this node's turn
    left: bool = at(4, default=False)  # this node has gone back, and stays back
    right: int = at(5, default=0)  # answers here that nobody complained about
    wrong: int = at(6, default=0)
    opinions: int = at(7, high=MAX_OPINIONS, default=0)  # times that further nodes had to try it


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """An adapter that must never be served again, and why."""

    adapter: str = at(1, limit=64)
    why: str = at(2, limit=400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """All of it."""

    known: tuple[Known, ...] = at(1, limit=MAX_KNOWN, default=())
    gone: tuple[Gone, ...] = at(2, limit=MAX_GONE, default=())
    votes: tuple[Vote, ...] = at(3, limit=MAX_VOTES, default=())
    revocations: tuple[Revocation, ...] = at(4, limit=MAX_REVOCATIONS, default=())
    proposed: tuple[Candidate, ...] = at(5, limit=MAX_CANDIDATES, default=())
    base: str = at(6, limit=64, default="")  # the model release that the next two are of
    right: int = at(7, default=0)  # answers of the model alone
    wrong: int = at(8, default=0)
