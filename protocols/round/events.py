"""What a round machine is told and what it orders. See SPEC.md, section Behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from protocols.delta.messages import DeltaRecord, Position
from protocols.ids import Cid, PeerId


@dataclass(frozen=True, slots=True)
class Input:
    """A delta to mix: x <- x + weight / sqrt(1 + staleness) * (theirs - x), by the rules of the mode."""

    peer: PeerId
    position: Position
    delta: Cid
    weight: Fraction
    staleness: int  # rounds behind our own


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Begin:
    """Take part. `after` is the last round in which this node published, or -1: a round is never done twice."""

    after: int = -1


@dataclass(frozen=True, slots=True)
class Arrived:
    """A record that passed its checks."""

    record: DeltaRecord


@dataclass(frozen=True, slots=True)
class Left:
    """A peer is gone, put out, or caught: nothing of it is used from now on, until it publishes again."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Trained:
    """The steps of this round are done."""


@dataclass(frozen=True, slots=True)
class Published:
    """The delta is packed, stored and announced."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A delta is here and passed its checks."""

    peer: PeerId
    delta: Cid


@dataclass(frozen=True, slots=True)
class Refused:
    """A delta could not be fetched, or failed its checks."""

    peer: PeerId
    delta: Cid
    reason: str


@dataclass(frozen=True, slots=True)
class Mixed:
    """The adapter is the mix now."""


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Take no part any more."""


Event = Begin | Arrived | Left | Trained | Published | Fetched | Refused | Mixed | Expired | Stop

# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Train:
    """Train the steps of this round; answer with Trained."""

    round: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Pack the adapter, announce it for this position, with our own last record and those of `mixed` as its parents;
    answer with Published."""

    position: Position
    mixed: tuple[Input, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch and check a delta; answer with Fetched or Refused."""

    peer: PeerId
    delta: Cid


@dataclass(frozen=True, slots=True)
class Mix:
    """Mix these into the adapter; answer with Mixed. `adopts`: they replace it."""

    inputs: tuple[Input, ...]
    adopts: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """This exchange goes on without a partner. For `status`; nothing to do."""

    peer: PeerId
    reason: str


Effect = Train | Publish | Fetch | Mix | Skip
