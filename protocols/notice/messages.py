"""A signed word of a member to everybody, one of each kind: what it has learned, proposes, votes for. See SPEC.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from protocols.codec import at
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.membership.messages import ASK, PUBLISH, SERVE, TRAIN, VOTE

LESSON: Final = "lesson"  # which frame and suite the network learns with
DELTA: Final = "delta"  # what a device has learned
CANDIDATE: Final = "candidate"  # an adapter that is proposed to be served
BALLOT: Final = "ballot"  # votes on candidates
LIVE: Final = "live"  # what who serves candidates has seen of them
EVIDENCE: Final = "evidence"  # who made two deltas for one position, with the proof
UPSTREAM: Final = "upstream"  # models of a server of its own that a member offers
COHORT: Final = "cohort"  # keys, shares and masked vectors, of which a cohort makes its mean
REVOCATION: Final = "revocation"  # candidates that must not be served any more

# Each kind is a domain of signed records, and its signer needs this role.
ROLE_OF: Final[Mapping[str, str]] = {
    LESSON: PUBLISH,
    UPSTREAM: SERVE,
    DELTA: TRAIN,
    EVIDENCE: TRAIN,
    COHORT: TRAIN,
    CANDIDATE: TRAIN,
    BALLOT: VOTE,
    LIVE: ASK,
    REVOCATION: VOTE,
}

MAX_CONTENT_BYTES: Final = 16 * 1024
HOLDS_S: Final = 6 * 3600.0  # after it was new; its writer renews it before that


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    peer: str = at(1, limit=64)  # the signer
    incarnation: int = at(2, low=1)  # UTC milliseconds of about when it was written, above that of the one before
    sequence: int = at(3)
    kind: str = at(4, limit=32)  # the domain of the record
    content: bytes = at(5, limit=MAX_CONTENT_BYTES)  # a message of that kind; empty: taken back


def check_notice(notice: Notice, domain: str, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless it is the signer's own, and of the kind that its record says."""
    if notice.peer != signer:
        raise RemoteProtocolError(f"{signer} signed a {domain} of {notice.peer}; a member speaks for itself alone")
    if notice.kind != domain:
        raise RemoteProtocolError(f"a record of the kind {domain!r} holds a notice of the kind {notice.kind[:32]!r}")
