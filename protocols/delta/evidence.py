"""What a member tells of those who made two deltas for one position: the content of a notice. See SPEC.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from protocols.codec import at, decode, encode
from protocols.delta.messages import Equivocation, Proof, prove

MAX_PROOFS: Final = 3  # of one member; the newest ones stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Nobody has to believe who passes it on: each proof is two records that the liar has signed."""

    proofs: tuple[Equivocation, ...] = at(1, limit=MAX_PROOFS)


def write_evidence(proofs: Iterable[Equivocation]) -> bytes:
    """The content of a notice with the last of these proofs."""
    return encode(Evidence(proofs=tuple(proofs)[-MAX_PROOFS:]))


def read_evidence(content: bytes) -> tuple[tuple[Proof, Equivocation], ...]:
    """What each proof proves, and the proof.

    Raises:
      RemoteProtocolError: the content is damaged, or a proof proves nothing.
    """
    return tuple((prove(one), one) for one in decode(Evidence, content).proofs)
