"""When a node may make the move that it should make, and when to look again."""

from __future__ import annotations

from math import inf
from typing import Final

from meshnode.policy.moves import Move

DEBOUNCE_S: Final = 0.6  # after the last peer came or went; peers of one mesh start within moments
DEBOUNCE_CAP_S: Final = 3.0  # since the first of them; also how long an incomplete mesh waits for more peers
URGENT_AFTER_S: Final = 2.0  # without a chain for this long, a node leaves also layers that it alone serves
CALM_S: Final = 60.0  # after a switch, no other move for speed alone
NEWS_S: Final = 10.0  # after a peer came or went, no move for speed alone: more may follow


class Patience:
    """What a node has seen happen, as far as it makes it wait. In seconds of one clock."""

    def __init__(self) -> None:
        self._members: object = ()
        self._members_since = -inf  # when the present change of members began
        self._members_changed = -inf
        self._broken_since = inf
        self._calm_until = -inf

    def see(self, members: object, now: float) -> None:
        """Who is there, as anything that differs when it does."""
        if members == self._members:
            return
        self._members = members
        if now >= self.settled_at:
            self._members_since = now
        self._members_changed = now

    def judge(self, *, broken: bool, now: float) -> None:
        """Whether some layer is served by nobody."""
        self._broken_since = min(self._broken_since, now) if broken else inf

    def switched(self, now: float) -> None:
        """We serve other layers than before."""
        self._calm_until = now + CALM_S

    @property
    def settled_at(self) -> float:
        """When the peers that came and went will have done so; before, nothing is worth deciding."""
        return min(self._members_changed + DEBOUNCE_S, self._members_since + DEBOUNCE_CAP_S)

    def allowed_at(self, move: Move, *, loses: bool, fits: bool) -> float:
        """The moment from which a move may be made, if nothing else changes until then.

        Args:
          loses: it gives up layers that nobody else serves.
          fits: the nodes that are there can hold the whole model.
        """
        at = self.settled_at
        if loses and move.urgent:
            at = max(at, self._broken_since + URGENT_AFTER_S)
        if move.source is None and not fits:  # the places would have to change when the next node comes
            at = max(at, self._members_since + DEBOUNCE_CAP_S)
        if move.source is not None and not move.repair:
            at = max(at, self._calm_until, self._members_changed + NEWS_S)
        return at
