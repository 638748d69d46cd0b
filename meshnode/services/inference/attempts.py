"""The attempts at one answer: whether there is a next one, whom its route avoids, and how long it is waited for."""

from __future__ import annotations

import math
from typing import Final

from meshnode.core.errors import Declined, PeerUnreachable
from protocols.ids import PeerId
from protocols.pipe.messages import LOST

OPEN_ATTEMPTS: Final = 3  # routes that are tried until every stage has taken the session
TAKEOVER_S: Final = 2.0  # until then, for the news who serves the layers of a node that has gone
HEAL_S: Final = 60.0  # and later: until somebody serves them
FRUITLESS: Final = 4  # routes that are lost one after the other without a token: then it may be the question
AVOID_S: Final = 1.0  # for one that was lost: it may be back, and the only one with its layers; doubles each time
PAUSE_S: Final = 1.0  # for one that refused and named no time
RETRY_CODES: Final = frozenset(
    {"fenced", "busy", "not-ready", "engine-lost", "bad-input", "too-long", "no-adapter", "no-grammar", LOST}
)
LATER_CODES: Final = RETRY_CODES | {"idle"}  # by then, that steps don't come is the fault of a stage before

Failure = Declined | PeerUnreachable


class Attempts:
    """Until every stage has taken an answer, few routes are tried: its asker can still be told to ask later.

    Afterwards it goes on for as long as there is hope.
    """

    def __init__(self, heal_s: float) -> None:
        """`heal_s`: how long an answer that has begun waits for a route; 0: it does not go on."""
        self.number = 0  # of the present attempt, as the stages know it
        self.failure: Failure | None = None  # of the last one, of those that ran once one has run
        self.may_be_slow = False  # it may only have been given too little time
        self._heal_s = heal_s
        self._taken = False
        self._told = False
        self._begun = False  # a token has come
        self._until: dict[PeerId, float] = {}
        self._fruitless = 0
        self._deadline = math.inf

    @property
    def goes_on(self) -> bool:
        """Whether a lost stage is waited for, and another attempt goes on where this one was lost."""
        return self._taken and self._heal_s > 0

    def taken(self) -> bool:
        """Every stage has taken it. Whether that is so for the first time."""
        first, self._taken = not self._taken, True
        return first

    def progressed(self) -> None:
        """A token came, or the vector."""
        self._begun, self._fruitless = True, 0

    def failed(self, failure: Failure, *, ran: bool, now: float) -> None:
        """An attempt is over.

        Args:
          ran: every stage had taken it.

        Raises the failure where another attempt can't help.
        """
        code = failure.code if isinstance(failure, Declined) else LOST
        if self.goes_on:
            self._fruitless += ran
            self.may_be_slow = False
            if code not in LATER_CODES:
                raise failure
            if ran:
                self.failure, self._deadline, self._told = failure, now + self._heal_s, False
            if self._fruitless >= FRUITLESS:
                raise self.given_up(f"{FRUITLESS} routes were lost without a further token")
            if now >= self._deadline:
                raise self.given_up(str(failure))
            retry_ms = failure.retry_ms if isinstance(failure, Declined) and code == "busy" else 0
            pause = AVOID_S * 2.0**self._fruitless if code != "busy" else retry_ms / 1000 or PAUSE_S
        else:
            last = self.number == OPEN_ATTEMPTS - 1
            if self._begun or code not in RETRY_CODES or failure.peer is None or last:
                raise failure
            self._deadline = now + TAKEOVER_S
            self.may_be_slow = not self.number and not self._taken and isinstance(failure, PeerUnreachable)
            self.failure = failure
            pause = math.inf
        if failure.peer is not None:
            self._until[failure.peer] = now + pause
        self.number += 1

    def waits(self) -> bool:
        """It has to wait for a route. Whether its asker is to be told: once for each loss."""
        first, self._told = not self._told, True
        return first and self.goes_on

    def avoided(self, now: float) -> set[PeerId]:
        """Peers that the next route must not have."""
        return {peer for peer, until in self._until.items() if until > now}

    def look_again_at(self, now: float) -> float:
        """When the next of them may be asked again, or nobody is waited for any longer."""
        return min([self._deadline, *(until for until in self._until.values() if until > now)])

    def has_time(self, now: float) -> bool:
        """Whether a route may still be waited for."""
        return self.failure is not None and now < self._deadline

    def given_up(self, why: str) -> Failure:
        """What to raise when there is no other route; the failure which led here comes first."""
        failure = self.failure
        if failure is None:
            raise ValueError("nothing has failed yet")
        if not self.goes_on:
            return failure  # that there is no other way is no news
        words = f"{failure}; the answer could not go on within {self._heal_s:.0f} s: {why}"
        if isinstance(failure, Declined):
            return Declined(failure.code, words, retry_ms=failure.retry_ms, peer=failure.peer)
        return PeerUnreachable(words, peer=failure.peer)
