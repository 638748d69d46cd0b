"""How much each key has used. In memory: a restart forgets it, and only the owner restarts a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshnode.http.problems import Problem
from meshnode.state.api_keys import ApiKey

MINUTE_S: Final = 60.0
DAY_S: Final = 86_400.0


@dataclass(slots=True)
class _Used:
    """Requests are a bucket that fills again evenly; tokens are counted for a day from the first one."""

    requests: float
    at: float  # seconds, monotonic
    tokens: int = 0
    day_began: float = 0.0


class Quotas:
    """Counts what keys use against their limits. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._used: dict[str, _Used] = {}

    def take(self, key: ApiKey, now: float) -> None:
        """One request. Raises Problem 429 with the time after which there is room again."""
        used = self._used.setdefault(key.id, _Used(float(key.requests_per_minute), now, day_began=now))
        if now - used.day_began >= DAY_S:
            used.tokens, used.day_began = 0, now
        if key.tokens_per_day and used.tokens >= key.tokens_per_day:
            text = f"the key {key.name} has used its {key.tokens_per_day} tokens of this day"
            raise Problem(429, "rate_limit_exceeded", text, retry_s=_up(used.day_began + DAY_S - now))
        if key.requests_per_minute:
            pace = key.requests_per_minute / MINUTE_S
            have = min(float(key.requests_per_minute), used.requests + (now - used.at) * pace)
            used.at, used.requests = now, have
            if have < 1:
                text = f"the key {key.name} may ask {key.requests_per_minute} times a minute"
                raise Problem(429, "rate_limit_exceeded", text, retry_s=_up((1 - have) / pace))
            used.requests = have - 1

    def spend(self, key: ApiKey, tokens: int) -> None:
        """Tokens of an answer and its prompt. What goes beyond the limit is taken from nobody."""
        if (used := self._used.get(key.id)) is not None:
            used.tokens += tokens


def _up(seconds: float) -> int:
    return max(1, int(-(-seconds // 1)))
