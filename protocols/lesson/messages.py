"""A lesson: the content of the notice with which a publisher has its network learn. See SPEC.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import at, decode
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, DAG_PB, RAW, Cid, cid_codec, cid_from_bytes, cid_of

MODES: Final = ("pairwise", "noloco", "elastic", "group", "hierarchical", "broadcast", "masked")  # protocols/round
MAX_FRAME_BYTES: Final = 4096
MAX_SUITE_BYTES: Final = 1 << 24
MAX_ROUNDS: Final = 100_000
MAX_STEPS: Final = 10_000  # of one round
MAX_BATCH: Final = 256
MAX_WAIT_S: Final = 86_400
MAX_GATE: Final = 4096
MAX_MIXES: Final = 16
MAX_LEAST: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    created_ms: int = at(1, low=1)  # UTC; of two lessons of one publisher the newer one holds
    frame: bytes = at(2, limit=MAX_FRAME_BYTES)  # the block (protocols/delta); its CID names the lineage
    suite: bytes = at(3, limit=36)  # binary CID of the file with the held-out samples
    suite_size: int = at(4, low=1, high=MAX_SUITE_BYTES)  # bytes
    mode: str = at(5, limit=16, default="pairwise")  # one of MODES
    codec: int = at(6, low=1, high=3, default=1)  # protocols/delta
    rounds: int = at(7, low=1, high=MAX_ROUNDS, default=12)
    steps: int = at(8, high=MAX_STEPS, default=5)  # of one round; 0: each device chooses when and how many
    batch: int = at(9, low=1, high=MAX_BATCH, default=8)  # samples of one step
    rate_micro: int = at(10, low=1, high=1_000_000, default=5000)  # the highest learning rate, in millionths
    mixes: int = at(11, high=MAX_MIXES, default=2)  # exchanges of one round; 0: as many as the exact mean takes
    wait_s: int = at(12, low=1, high=MAX_WAIT_S, default=600)  # for a late partner
    least: int = at(13, low=1, high=MAX_LEAST, default=2)  # participants before the first round
    gate: int = at(14, high=MAX_GATE, default=64)  # samples of the suite that judge one delta; 0: none are judged
    start: bytes = at(15, limit=36, default=b"")  # binary CID of the adapter that all begin with; empty: none

    @property
    def suite_cid(self) -> Cid:
        return cid_from_bytes(self.suite)

    @property
    def start_cid(self) -> Cid | None:
        return cid_from_bytes(self.start) if self.start else None


def read_lesson(content: bytes) -> Lesson:
    """Check the content of a notice.

    Raises:
      RemoteProtocolError: it is not a lesson; the sentence says why.
    """
    lesson = decode(Lesson, content)
    if lesson.mode not in MODES:
        raise RemoteProtocolError(f"A lesson of the mode {lesson.mode!r}; there are {', '.join(MODES)}.")
    if not _is_cid(lesson.suite, RAW, DAG_PB):
        raise RemoteProtocolError("The suite of a lesson is not named by the CID of a file.")
    if lesson.start and not _is_cid(lesson.start, DAG_CBOR):
        raise RemoteProtocolError("The adapter that a lesson begins with is not named by the CID of a manifest.")
    return lesson


def _is_cid(data: bytes, *codecs: int) -> bool:
    try:
        return cid_codec(cid_from_bytes(data)) in codecs
    except RemoteProtocolError:
        return False


def lesson_cid(content: bytes) -> Cid:
    """The name of a lesson."""
    return cid_of(RAW, content)
