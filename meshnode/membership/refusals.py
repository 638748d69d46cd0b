"""Who was not let in, or did not let us in: what people are shown about it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Final

from meshnode.core.clock import Wall
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from protocols.ids import PeerId, short
from protocols.membership.machine import Rejected, refusal_of

MAX_REFUSALS: Final = 64  # remembered for status

_log = get_logger("membership")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A peer that was not let in, or that did not let us in."""

    at_ms: int  # UTC milliseconds, the last time
    peer: PeerId
    code: str
    sentence: str
    by_us: bool
    count: int = 1


class Refusals:
    """The latest refusals; repeats of the same peer and code are counted in one entry."""

    def __init__(self, us: PeerId, health: Health, wall: Wall) -> None:
        self._us = us
        self._health = health
        self._wall = wall
        self._kept: deque[Refusal] = deque(maxlen=MAX_REFUSALS)

    def all(self) -> tuple[Refusal, ...]:
        """Oldest first."""
        return tuple(self._kept)

    def note(self, peer: PeerId, rejected: Rejected) -> None:
        """A hello with `peer` ended with a refusal."""
        code, sentence, by_us = rejected.code, rejected.reason, rejected.by_us
        new = Refusal(at_ms=self._wall(), peer=peer, code=code, sentence=sentence, by_us=by_us)
        for old in self._kept:
            if (old.peer, old.code, old.by_us) == (peer, code, by_us):
                self._kept.remove(old)
                new = replace(new, count=old.count + 1)
                break
        self._kept.append(new)
        _log.warning("peer.refused", peer=peer, code=code, reason=sentence, by_us=by_us)
        reason = sentence.removeprefix(refusal_of(peer if by_us else self._us, ""))
        self._health.set("refused-peer", peer=_name(peer, by_us=by_us), reason=f"{reason}.")

    def clear(self, peer: PeerId) -> None:
        """It is admitted now, and so are we: nothing of it is wrong any more."""
        for by_us in (True, False):
            self._health.clear("refused-peer", peer=_name(peer, by_us=by_us))


def _name(peer: PeerId, *, by_us: bool) -> str:
    return short(peer) if by_us else f"This node, by {short(peer)},"
