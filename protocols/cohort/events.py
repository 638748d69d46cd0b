"""What a cohort machine is told and what it orders. See SPEC.md, section Behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from protocols.cohort.masking import Pads
from protocols.cohort.messages import Masked, Word
from protocols.ids import Cid, PeerId

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Begin:
    """Our adapter is ready."""

    behind: frozenset[PeerId] = frozenset()  # members that have missed a round, and are not waited for as long


@dataclass(frozen=True, slots=True)
class Heard:
    """A word that `open_word` took, of any member, cohort and round."""

    word: Word


@dataclass(frozen=True, slots=True)
class Stored:
    """Our masked vector is stored under this name."""

    cid: bytes  # binary
    size: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The masked vector of a member is here, and hashes to its name."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline has passed."""


Event = Begin | Heard | Stored | Fetched | Expired

# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Say:
    """Sign this word and tell everybody, in place of our word of this round before."""

    word: Word


@dataclass(frozen=True, slots=True)
class Mask:
    """Mask our adapter and store it; answer with Stored."""

    pads: Pads


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch a masked vector; answer with Fetched if that succeeds."""

    peer: PeerId
    cid: Cid
    size: int


@dataclass(frozen=True, slots=True)
class Unmask:
    """The last order: the mean is that of these masked vectors, with what did not cancel out taken away."""

    survivors: tuple[PeerId, ...]
    files: tuple[Masked, ...]
    pads: Pads


@dataclass(frozen=True, slots=True)
class Blame:
    """A member did what no honest one does."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The last order: there is no mean in this round."""

    reason: str


Effect = Say | Mask | Fetch | Unmask | Blame | Fail
