"""What members say about adapters that are to be served: candidates, votes, experience, revocations. See SPEC.md.

Each class that ends in a plural is the content of one notice (`protocols/notice`): one writer, the newest wins.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, Self

from protocols.codec import at, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, RAW, Cid, PeerId, cid_codec, cid_of, cid_to_bytes

MAX_CANDIDATES: Final = 4  # of one proposer, the newest first
MAX_VOTES: Final = 16  # of one voter, the newest first
MAX_TALLIES: Final = 4  # of one node: what it serves, what it served before, what is being rolled out
MAX_REVOCATIONS: Final = 32  # of one voter, the newest first
MAX_PARENTS: Final = 16  # deltas that were mixed into a candidate
MAX_LOSS: Final = 1_000_000_000  # micro-nats per token: 1000 nats is no model any more

SUITE, LIVE_ERRORS, PERSON = "suite", "live", "person"
GROUNDS: Final = (SUITE, LIVE_ERRORS, PERSON)

_VERSION: Final = re.compile(
    r"v(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})(?:-(0|[1-9][0-9]{0,8}))?"
)


class Version(NamedTuple):
    """vMAJOR.MINOR.PATCH-ADAPTER: the first three of the model release, the last counts the adapters on it."""

    major: int
    minor: int
    patch: int
    adapter: int  # 0: none

    @classmethod
    @lru_cache(256)
    def parse(cls, text: str) -> Self:
        """Of "v1.0.0-3", or "v1.0.0" for no adapter. Raises RemoteProtocolError."""
        found = _VERSION.fullmatch(text)
        if found is None:
            raise RemoteProtocolError(f"{text[:40]!r} is no version like v1.0.0-3")
        return cls(*(int(part or 0) for part in found.groups()))

    @property
    def base(self) -> tuple[int, int, int]:
        """Of the model release."""
        return self[:3]

    def __str__(self) -> str:
        return f"v{self.major}.{self.minor}.{self.patch}-{self.adapter}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An adapter that is proposed to be served instead of another one."""

    adapter: str = at(1, limit=64)  # CID of its manifest (protocols/adapter)
    base: str = at(2, limit=64)  # CID of the manifest of the model release that it is for
    frame: str = at(3, limit=64)  # CID of its frame (protocols/delta)
    suite: str = at(4, limit=64)  # CID of the samples that it is judged on
    version: str = at(5, limit=40)
    previous: str = at(6, limit=64, default="")  # the adapter that it is to replace; empty: the model alone
    round: int = at(7, high=1 << 32, default=0)  # of learning, in which it was made
    parents: tuple[str, ...] = at(8, limit=MAX_PARENTS, default=())  # CIDs of the deltas that were mixed into it


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Content of a `candidate` notice."""

    proposed: tuple[Candidate, ...] = at(1, limit=MAX_CANDIDATES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A candidate and what it is to replace, on the samples of the suite that `suite_seed` draws for the voter."""

    candidate: str = at(1, limit=64)  # `candidate_id`, which fixes the suite
    samples: int = at(2, low=1, high=1 << 20)
    loss_new: int = at(3, high=MAX_LOSS)  # mean loss of the candidate, micro-nats per token
    loss_old: int = at(4, high=MAX_LOSS)  # of what it is to replace
    ci95: int = at(5, high=MAX_LOSS)  # half the 95 % confidence interval of the difference, micro-nats
    hardware: str = at(6, limit=64, default="")  # for people

    @property
    def delta(self) -> int:
        """Micro-nats that the candidate is worse; below 0 it is better."""
        return self.loss_new - self.loss_old

    @property
    def is_worse(self) -> bool:
        """Whether it is worse by more than two standard errors."""
        return self.delta * 196 > self.ci95 * 200 and self.delta > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballots:
    """Content of a `ballot` notice."""

    votes: tuple[Vote, ...] = at(1, limit=MAX_VOTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a node has seen of one adapter in its own use."""

    candidate: Candidate | None = at(1, default=None)  # None: the model alone
    released: bool = at(2, default=False)  # for this node, the roll-out is over
    right: int = at(3, default=0)  # answers that nobody complained about
    wrong: int = at(4, default=0)  # answers that failed, or that a person called wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Tallies:
    """Content of a `live` notice."""

    base: str = at(1, limit=64)  # CID of the model release that all of them are for
    seen: tuple[Tally, ...] = at(2, limit=MAX_TALLIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """The signer's word that an adapter must not be served."""

    adapter: str = at(1, limit=64)
    ground: str = at(2, limit=16)  # one of GROUNDS
    why: str = at(3, limit=100)  # for people
    right: int = at(4, default=0)  # answers, for the ground "live"
    wrong: int = at(5, default=0)
    usual: int = at(6, high=1_000_000, default=0)  # wrong answers per million that are usual


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocations:
    """Content of a `revocation` notice."""

    revoked: tuple[Revocation, ...] = at(1, limit=MAX_REVOCATIONS)


Content = Candidates | Ballots | Tallies | Revocations


@lru_cache(1024)
def candidate_id(candidate: Candidate) -> Cid:
    """What votes name: all that a candidate says of itself, so that none of it can be exchanged afterwards."""
    return cid_of(RAW, encode(candidate))


def draw(candidate: str, peer: str) -> int:
    """H(candidate || peer), 64 bits: the order in which peers begin to use a candidate. Nobody can choose it."""
    return int.from_bytes(hashlib.sha256(f"meshnode roll-out {candidate} {peer}".encode()).digest()[:8], "big")


def suite_seed(candidate: str, voter: str) -> int:
    """Which samples of the suite a voter takes, 63 bits. The candidate fixes it, so nobody knew before."""
    return int.from_bytes(hashlib.sha256(f"meshnode suite {candidate} {voter}".encode()).digest()[:8], "big") >> 1


def check_content(content: Content, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless everything in it can be used."""
    match content:
        case Candidates(proposed=proposed):
            for candidate in proposed:
                check_candidate(candidate, signer)
            _check_once([candidate_id(candidate) for candidate in proposed], "candidate", signer)
        case Ballots(votes=votes):
            for vote in votes:
                _check_vote(vote, signer)
            _check_once([vote.candidate for vote in votes], "vote", signer)
        case Tallies(base=base, seen=seen):
            _check_block(base, "a model release", signer)
            for tally in seen:
                if tally.candidate is not None:
                    check_candidate(tally.candidate, signer)
                    if tally.candidate.base != base:
                        raise RemoteProtocolError(f"{signer} reports of an adapter for another model than it names")
            _check_once([tally.candidate.adapter if tally.candidate else "" for tally in seen], "report", signer)
        case Revocations(revoked=revoked):
            for revocation in revoked:
                _check_revocation(revocation, signer)
            _check_once([revocation.adapter for revocation in revoked], "revocation", signer)


def check_candidate(candidate: Candidate, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless it names what can be fetched, and counts up."""
    _check_block(candidate.adapter, "an adapter", signer)
    _check_block(candidate.base, "a model release", signer)
    _check_block(candidate.frame, "a frame", signer)
    cid_to_bytes(candidate.suite)
    if candidate.previous:
        _check_block(candidate.previous, "an adapter", signer)
    if candidate.previous == candidate.adapter:
        raise RemoteProtocolError(f"{signer} proposes to replace the adapter {candidate.adapter} by itself")
    for parent in candidate.parents:
        cid_to_bytes(parent)
    if str(Version.parse(candidate.version)) != candidate.version or not Version.parse(candidate.version).adapter:
        raise RemoteProtocolError(f"{signer} proposes {candidate.version!r}; a candidate counts from v1.0.0-1 on")


def _check_vote(vote: Vote, signer: PeerId) -> None:
    if cid_codec(vote.candidate) != RAW:
        raise RemoteProtocolError(f"{signer} votes on {vote.candidate}, which is no candidate")
    _check_text(vote.hardware, signer)


def _check_revocation(revocation: Revocation, signer: PeerId) -> None:
    _check_block(revocation.adapter, "an adapter", signer)
    if revocation.ground not in GROUNDS:
        raise RemoteProtocolError(
            f"{signer} revokes on the ground {revocation.ground!r}; grounds are {', '.join(GROUNDS)}"
        )
    _check_text(revocation.why, signer)


def _check_block(cid: str, what: str, signer: PeerId) -> None:
    if cid_codec(cid) != DAG_CBOR:
        raise RemoteProtocolError(f"{signer} names {cid} as {what}, which is no dag-cbor block")


def _check_text(text: str, signer: PeerId) -> None:
    if not text.isprintable():
        raise RemoteProtocolError(f"{signer} gives a text that can't be printed")


def _check_once(names: list[str], what: str, signer: PeerId) -> None:
    if len(set(names)) != len(names):
        raise RemoteProtocolError(f"{signer} gives two of its words ({what}) for the same thing in one notice")
