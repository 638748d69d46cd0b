"""What this node has seen of the peers that compute for it: who failed, and how fast each really is.

What a peer says of its speed is not believed beyond what we have measured ourselves, on whole answers, with our own
clock: time that no stage of a route accounts for counts against each of its stages. A peer that we don't know yet
counts as an ordinary one, so it gets a share, and earns more with every answer. One that failed is avoided for a
while, longer each time, and forgiven when it answers again. The last stage could lie about the times of the others;
it can't make the whole shorter, and other routes tell them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Final

from protocols.ids import PeerId

FIRST_PAUSE_S: Final = 15.0  # a peer is avoided after it failed; doubles with each failure
LAST_PAUSE_S: Final = 600.0
FORGET_S: Final = 1800.0  # without a failure: as if there had been none
NEWEST: Final = 0.3  # weight of the newest answer in the moving average of a speed
ANSWERS_TO_DOUBLE: Final = 2  # so many answers earn a newcomer twice the usual speed, twice as many three times
SLOWER: Final = 3.0  # times as long as a peer says is worth a word
SURE: Final = 3  # answers, before it is said
MAX_PEERS: Final = 1024


@dataclass(slots=True)
class _Peer:
    failures: int = 0
    failed_at: float = 0.0
    until: float = 0.0
    reason: str = ""
    answers: int = 0
    layer_us: float = 0.0  # one row through one layer, as we measured it; 0: never


@dataclass(frozen=True, slots=True)
class Part:
    """What a stage says that it took for a token: waiting for its engine, and computing."""

    peer: PeerId
    layers: int
    us: int


class Experience:
    """Kept per peer, in memory, for the life of this node. Times are seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, _Peer] = {}

    def failed(self, peer: PeerId, reason: str, now: float) -> float:
        """It was lost, or kept us waiting in vain. Returns for how long it is avoided."""
        known = self._peer(peer)
        known.failures = 1 if now - known.failed_at > FORGET_S else known.failures + 1
        pause = min(LAST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (known.failures - 1))
        known.failed_at, known.until, known.reason = now, now + pause, reason
        return pause

    def answered(self, peers: Collection[PeerId]) -> None:
        """An answer came through these peers: what was is forgiven by half, and they may be asked again."""
        for peer in peers:
            known = self._peer(peer)
            known.failures, known.until = known.failures // 2, 0.0
            known.answers += 1

    def measured(self, parts: Sequence[Part], token_us: float) -> None:
        """Take the times of an answer into the moving averages.

        Args:
          parts: the stages on other devices.
          token_us: time of one token by our clock, without the ways between the stages and our own stage.
        """
        unexplained = max(0.0, token_us - sum(part.us for part in parts))
        for part in parts:
            known = self._peer(part.peer)
            layer_us = (part.us + unexplained / len(parts)) / max(1, part.layers)
            known.layer_us += (layer_us - known.layer_us) * (NEWEST if known.layer_us else 1.0)

    def slower(self, claims: Mapping[PeerId, int]) -> dict[PeerId, float]:
        """Who takes `SLOWER` times as long as it says, or longer, over several answers: how many times as long."""
        return {
            peer: known.layer_us / claims[peer]
            for peer, known in self._peers.items()
            if claims.get(peer) and known.answers >= SURE and known.layer_us >= SLOWER * claims[peer]
        }

    def avoided(self, now: float) -> Mapping[PeerId, str]:
        """Who is avoided now, and why."""
        return {peer: known.reason for peer, known in self._peers.items() if known.until > now}

    def least_us(self, claims: Mapping[PeerId, int]) -> dict[PeerId, int]:
        """For each peer: microseconds of a row through a layer below which its word is not believed.

        claims: what each says.
        """
        measured = {peer: known.layer_us for peer, known in self._peers.items() if known.layer_us}
        ordinary = _ordinary(claims, measured)
        out = {}
        for peer in claims:
            answers = self._peers[peer].answers if peer in self._peers else 0
            earned = ordinary / (1 + answers / ANSWERS_TO_DOUBLE)
            out[peer] = round(max(earned, measured.get(peer, 0.0)) if answers else ordinary)
        return out

    def _peer(self, peer: PeerId) -> _Peer:
        if peer not in self._peers and len(self._peers) >= MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        return self._peers.setdefault(peer, _Peer())


def _ordinary(claims: Mapping[PeerId, int], measured: Mapping[PeerId, float]) -> float:
    """The layer time of an ordinary peer: of those that we have measured, else of what all say."""
    known: Collection[float] = [us for peer, us in measured.items() if peer in claims] or list(claims.values())
    return float(median_low(sorted(known))) if known else 0.0
