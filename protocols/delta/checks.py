"""What a node checks before it uses another's delta, the cheap things first. SPEC.md, section Validation.

`judge_record` and `judge_age` need the signed record alone and decide whether its bytes are fetched; `judge_payload`
decides whether they are used. Each refusal has its reason, for `status` and for the signer's reputation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from protocols.delta.codec import largest_payload, unpack_delta
from protocols.delta.frame import Vector
from protocols.delta.messages import Codec, DeltaRecord, Made, Position, name_of
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, short

MAX_STALENESS: Final = 4  # rounds; older deltas say more about the past than about the signer's data (SSP)


class Why(Enum):
    """Why a delta is not used."""

    ROLE = "role"
    FRAME = "frame"
    LINEAGE = "lineage"
    REPLAYED = "replayed"
    EQUIVOCATED = "equivocated"
    STALE = "stale"
    AHEAD = "ahead"
    KIND = "kind"
    SIZE = "size"
    ENCODING = "encoding"
    NORM = "norm"

    @property
    def hostile(self) -> bool:
        """Whether no honest node does this: counts against the signer. The others come from being late, new or
        elsewhere."""
        return self in (Why.EQUIVOCATED, Why.SIZE, Why.ENCODING, Why.NORM)


@dataclass(frozen=True, slots=True)
class Refusal:
    why: Why
    sentence: str  # for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the deltas of a lineage look like at this moment."""

    frame: Cid
    parameters: int  # of the frame
    base: Cid | None  # adapter manifest that deltas count from; None: the frame's start
    round: int  # that the network has reached
    adds: bool  # whether rounds are added up (broadcast) or adapters mixed


def judge_record(
    record: DeltaRecord, expected: Expected, *, may_train: bool, last: DeltaRecord | None
) -> Refusal | None:
    """Whether the delta of a record that `open_delta` took may be fetched; None: yes.

    Args:
      may_train: the signer's certificate has the role.
      last: the newest record of this signer and frame that was accepted before.
    """
    who, made = short(record.peer), record.made
    if not may_train:
        return Refusal(Why.ROLE, f"{who} published a delta without the role 'train'")
    if record.frame_cid != expected.frame:
        return Refusal(
            Why.FRAME,
            f"the delta of {who} is of the frame {short(record.frame_cid)}; "
            f"this node learns in {short(expected.frame)}",
        )
    base = name_of(record.base) if record.base else None
    if base != expected.base:
        return Refusal(
            Why.LINEAGE,
            f"the delta of {who} counts from {_adapter(base)}; this node's from {_adapter(expected.base)}. "
            "Whoever is behind takes the newest adapter first",
        )
    if last is not None and made.position == last.position and made.cid != last.made.cid:
        return Refusal(Why.EQUIVOCATED, f"{who} published two deltas {_place(made.position)}")
    if last is not None and made.position <= last.position:
        return Refusal(Why.REPLAYED, f"the delta of {who} {_place(made.position)} came again, or after a later one")
    if record.adds != expected.adds:
        kinds = ("a whole adapter", "the change of a round")
        return Refusal(Why.KIND, f"{who} published {kinds[record.adds]}; this lineage takes {kinds[expected.adds]}")
    too_large = _size_refusal(made, Codec(record.codec), expected, who)
    if too_large is None and record.whole is not None:
        too_large = _size_refusal(record.whole, Codec.INT8, expected, who)
    return too_large


def judge_age(record: DeltaRecord, expected: Expected) -> Refusal | None:
    """Whether a delta is too far from the round that the network has reached to be used; None: it is not.

    Such a record still says where its signer is, so the round machine is told of it; and uses none of its deltas.
    """
    who, made = short(record.peer), record.made
    if made.round < expected.round - MAX_STALENESS:
        return Refusal(
            Why.STALE,
            f"the delta of {who} is of round {made.round}; the network has reached {expected.round}, "
            f"and takes {MAX_STALENESS} rounds back",
        )
    if made.round > expected.round + MAX_STALENESS:
        return Refusal(
            Why.AHEAD,
            f"the delta of {who} claims round {made.round}; half of all have reached {expected.round}",
        )
    return None


def _size_refusal(made: Made, codec: Codec, expected: Expected, who: str) -> Refusal | None:
    most = largest_payload(codec, expected.parameters)
    if made.size <= most:
        return None
    return Refusal(Why.SIZE, f"the delta of {who} has {made.size} bytes; {codec.name.lower()} takes {most} at most")


def judge_payload(
    payload: bytes, made: Made, codec: Codec, expected: Expected, *, most_norm: float, who: str
) -> Vector | Refusal:
    """The vector in the bytes that a record named, or why it is not used.

    Args:
      payload: what was fetched by `made.cid`, hashed already.
      most_norm: the largest Euclidean norm that is plausible now (`meshnode.policy.robust`).
      who: the signer.
    """
    name = short(who)
    if len(payload) != made.size:
        return Refusal(Why.SIZE, f"the delta of {name} has {len(payload)} bytes; its record says {made.size}")
    try:
        vector = unpack_delta(payload, codec=codec, parameters=expected.parameters)
    except RemoteProtocolError as error:
        return Refusal(Why.ENCODING, f"the delta of {name} can't be read: {error}")
    norm = float(np.linalg.norm(vector))
    if not norm <= most_norm:
        return Refusal(Why.NORM, f"the delta of {name} has the norm {norm:.3g}; {most_norm:.3g} is plausible at most")
    return vector


def _adapter(base: Cid | None) -> str:
    return "the start of its frame" if base is None else f"the adapter {short(base)}"


def _place(position: Position) -> str:
    where = f" after exchange {position.exchange}" if position.exchange else ""
    return f"of round {position.round}{where}"
