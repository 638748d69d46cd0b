"""How far a candidate has come, for people and programs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocols.ids import Cid
from protocols.rollout.count import Counted


class Phase(Enum):
    OPEN = "open"  # votes are collected
    ROLLING = "rolling"  # the first nodes use it
    HELD = "held"  # no further node begins to
    RELEASED = "released"  # served
    REPLACED = "replaced"  # was released, and something newer is
    REFUSED = "refused"  # the votes do not find it better
    OVERTAKEN = "overtaken"  # another one has its place
    REVOKED = "revoked"  # never again
    LEFT = "left"  # this node alone has gone back
    FOREIGN = "foreign"  # not for what is served here


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One candidate as this node sees it."""

    id: Cid
    counted: Counted
    phase: Phase
    why: str  # a clause
    share: int  # per mille of all nodes that use it by now
    in_use: bool  # by questions of this node
    right: int  # answers with it here
    wrong: int
