"""What a node says about a delta that it made, and the proof that somebody made two. See SPEC.md.

A `DeltaRecord` is signed for itself and is the content of a notice of the kind "delta" (`protocols/notice`); so its
hash stays when the notice is renewed, and it proves what it says to whoever gets it. The bytes of the delta are a
file that is fetched by its CID.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

from nacl.signing import SigningKey

from protocols.codec import at, decode, encode
from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, DAG_PB, KEPT_IDS, RAW, Cid, PeerId, cid_codec, cid_from_bytes, cid_of

DELTA_RECORD: Final = "delta-record"  # domain of the signed record
HEADER_BYTES: Final = 16  # before the values of a delta
MAX_RECORD_BYTES: Final = 2048  # one with everything in it has about 1600; six of them fit into a notice
MAX_PARENTS: Final = 16
MAX_RECENT: Final = 8  # earlier deltas that a record names: what a peer that was away for a while can still add
MAX_ROUND: Final = 1 << 40
MAX_EXCHANGE: Final = 15  # mixes of one round, less one
MAX_PAYLOAD: Final = 1 << 27  # bytes; the largest frame in int8 takes 71 million
MAX_STEPS: Final = 1 << 32
MAX_MILLI: Final = 1 << 40


class Codec(IntEnum):
    """How the values are written."""

    INT8 = 1
    INT4 = 2
    SPARSE = 3

    @property
    def kept(self) -> float:
        """The part of the residual that goes into the next delta: errors of dense forms are small and without
        bias, a sparse form would send old changes long after they made sense (SparseLoCo, arXiv 2508.15706)."""
        return 0.95 if self is Codec.SPARSE else 1.0


@lru_cache(KEPT_IDS)
def name_of(cid: bytes) -> Cid:
    """The text form of a binary CID: the same few are looked at again and again. Raises RemoteProtocolError."""
    return cid_from_bytes(cid)


class Position(NamedTuple):
    """When a delta was made. A signer makes one for each position, in ascending order."""

    round: int
    exchange: int  # 0: after training; n: after the n-th mix of the round


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A delta that the signer made."""

    round: int = at(1, high=MAX_ROUND)
    exchange: int = at(2, high=MAX_EXCHANGE, default=0)
    cid: bytes = at(3, size=36)  # of the file
    size: int = at(4, low=HEADER_BYTES, high=MAX_PAYLOAD)  # bytes

    @property
    def position(self) -> Position:
        return Position(self.round, self.exchange)

    @property
    def name(self) -> Cid:
        return name_of(self.cid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """The differential privacy of everything that the signer has published in this lineage, this delta included."""

    epsilon_milli: int = at(1, high=MAX_MILLI)
    delta_nano: int = at(2, low=1, high=1_000_000_000)
    sigma_milli: int = at(3, low=1, high=MAX_MILLI)  # noise, as a multiple of the clip
    clip_milli: int = at(4, low=1, high=MAX_MILLI)  # most norm of one sample's gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRecord:
    peer: str = at(1, limit=64)  # the signer
    frame: bytes = at(2, size=36)  # binary CID
    base: bytes = at(3, limit=36, default=b"")  # CID of the adapter manifest that deltas count from; empty: the start
    made: Made = at(4)
    codec: int = at(5, low=min(Codec), high=max(Codec))
    adds: bool = at(6, default=False)  # the payload is what the round changed, not the whole difference from the base
    whole: Made | None = at(7)  # if it adds: the whole difference, for peers that can't add up what led there
    parents: tuple[bytes, ...] = at(8, limit=MAX_PARENTS, default=())  # `record_cid`s of what was mixed into it
    steps: int = at(9, high=MAX_STEPS, default=0)  # of training in this round
    samples: int = at(10, high=MAX_STEPS, default=0)  # that the steps have seen
    loss_before_milli: int = at(11, high=MAX_MILLI, default=0)  # of the training, not of a suite
    loss_after_milli: int = at(12, high=MAX_MILLI, default=0)
    privacy: Privacy | None = at(13)
    recent: tuple[Made, ...] = at(14, limit=MAX_RECENT, default=())  # the deltas before this one, newest first

    @property
    def position(self) -> Position:
        return self.made.position

    @property
    def frame_cid(self) -> Cid:
        return name_of(self.frame)


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivocation:
    """Two signed records of one signer that name different deltas for one position."""

    first: bytes = at(1, limit=MAX_RECORD_BYTES)
    second: bytes = at(2, limit=MAX_RECORD_BYTES)


@dataclass(frozen=True, slots=True)
class Proof:
    """What an equivocation proves."""

    peer: PeerId
    frame: Cid
    position: Position
    cids: tuple[Cid, Cid]


def sign_delta(key: SigningKey, record: DeltaRecord) -> bytes:
    """The signed record. Raises LocalProtocolError for a field out of its limits."""
    return sign_record(key, DELTA_RECORD, encode(record))


def record_cid(data: bytes) -> Cid:
    """The name of a signed record in the history: it covers the delta, its parents and the signature."""
    return cid_of(RAW, data)


def open_delta(data: bytes) -> DeltaRecord:
    """Check a signed record and everything in it that needs no knowledge of the network.

    Raises:
      RemoteProtocolError: too large, damaged, forged, of another signer, or it contradicts itself.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise RemoteProtocolError(f"A record of a delta has {len(data)} bytes; the limit is {MAX_RECORD_BYTES}.")
    opened = open_record(data, domain=DELTA_RECORD)
    record = decode(DeltaRecord, opened.payload)
    check_delta(record, opened.signer)
    return record


def check_delta(record: DeltaRecord, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless the record is the signer's own and says what a record can say."""
    if record.peer != signer:
        raise RemoteProtocolError(f"{signer} signed a delta of {record.peer[:64]}; a node speaks for itself alone.")
    _check_cid(record.frame, (DAG_CBOR,), f"the frame of a delta of {signer}")
    if record.base:
        _check_cid(record.base, (DAG_CBOR,), f"the base of a delta of {signer}")
    for made in (record.made, *record.recent, *((record.whole,) if record.whole else ())):
        _check_cid(made.cid, (RAW, DAG_PB), f"a delta of {signer}")
    for parent in record.parents:
        _check_cid(parent, (RAW,), f"a parent of a delta of {signer}")
    if list(record.parents) != sorted(set(record.parents)):
        raise RemoteProtocolError(f"The parents of a delta of {signer} are not sorted, or come twice.")
    positions = [made.position for made in (record.made, *record.recent)]
    if any(later <= earlier for later, earlier in pairwise(positions)):
        raise RemoteProtocolError(f"The recent deltas of {signer} do not go back in time.")
    if (record.whole is not None) != record.adds or (record.whole and record.whole.position != record.position):
        raise RemoteProtocolError(
            f"A delta of {signer} adds without naming the whole of its position, or the reverse."
        )


def _check_cid(data: bytes, codecs: tuple[int, ...], what: str) -> None:
    try:
        fits = cid_codec(name_of(data)) in codecs
    except RemoteProtocolError:
        fits = False
    if not fits:
        raise RemoteProtocolError(f"{what[0].upper()}{what[1:]} is not named by a CID of that kind.")


def contradiction(one: DeltaRecord, other: DeltaRecord) -> Position | None:
    """The newest position for which two records of one signer and frame name different deltas."""
    if one.peer != other.peer or one.frame != other.frame:
        return None
    said = {made.position: made.cid for made in (one.made, *one.recent)}
    return max(
        (m.position for m in (other.made, *other.recent) if said.get(m.position, m.cid) != m.cid),
        default=None,
    )


def prove(proof: Equivocation) -> Proof:
    """What two records prove, whoever passed them on.

    Raises:
      RemoteProtocolError: a record is not valid, or they do not contradict each other.
    """
    one, other = open_delta(proof.first), open_delta(proof.second)
    position = contradiction(one, other)
    if position is None:
        raise RemoteProtocolError(
            f"Two records of {one.peer} are passed on as contradicting each other, and they do not."
        )
    cids = [
        next(made.name for made in (record.made, *record.recent) if made.position == position)
        for record in (one, other)
    ]
    return Proof(PeerId(one.peer), one.frame_cid, position, (cids[0], cids[1]))
