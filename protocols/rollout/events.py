"""What a roll-out is told and what it orders: the events and effects of `machine.py`."""

from __future__ import annotations

from dataclasses import dataclass

from protocols.ids import Cid
from protocols.rollout.count import Count
from protocols.rollout.memory import Memory
from protocols.rollout.messages import Candidate, Content, Vote
from protocols.rollout.skew import Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds."""

    collect_s: float = 120.0  # votes are collected before the first node uses a candidate: the quickest may all lie
    soak_s: float = 900.0  # from one step of a roll-out to the next, and while it is held to another opinion
    report_s: float = 30.0  # between two reports of what was seen
    retry_s: float = 600.0  # until a judgement that failed is tried again


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Serving:
    """What the network serves has changed, or was found out; None: nothing, or it is not known."""

    served: Served | None


@dataclass(frozen=True, slots=True)
class Heard:
    """What everybody has said, ourselves among them."""

    count: Count


@dataclass(frozen=True, slots=True)
class Judged:
    """The answer to Judge."""

    vote: Vote


@dataclass(frozen=True, slots=True)
class NotJudged:
    """The answer to Judge when it can't be judged now."""

    candidate: Cid


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer was given with this adapter (empty: none)."""

    adapter: str
    wrong: bool  # it failed


@dataclass(frozen=True, slots=True)
class Corrected:
    """A person called an answer wrong that was counted as right."""

    adapter: str


@dataclass(frozen=True, slots=True)
class Proposed:
    """This node proposes a candidate."""

    candidate: Candidate


@dataclass(frozen=True, slots=True)
class RolledBack:
    """A person at this node takes an adapter back."""

    adapter: str
    why: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline has passed."""


Event = Serving | Heard | Judged | NotJudged | Answered | Corrected | Proposed | RolledBack | Expired


# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Say:
    """Give notice of this, in place of what was said before."""

    content: Content


@dataclass(frozen=True, slots=True)
class Judge:
    """Compare a candidate with what it is to replace, on the samples that `seed` draws.

    Answer with Judged or NotJudged.
    """

    id: Cid
    candidate: Candidate
    seed: int


@dataclass(frozen=True, slots=True)
class Use:
    """Questions of this node use this adapter from now on; None: the model alone."""

    candidate: Candidate | None


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep this on the disk."""

    memory: Memory


Effect = Say | Judge | Use | Remember
