"""Gossip whose taker is spared by those who bring nothing new."""

from __future__ import annotations

import trio

from meshnode.net.port import Take
from protocols.bucket import Buckets
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId


class BoundedTaker:
    """A `Take` of net/port.py around another one; that may raise RemoteProtocolError for what is no message.

    Each peer may bring a number of messages that are no news; more of them are dropped unread, with all else that it
    brings, until time has passed. Honest peers pass on news alone, and what is dropped of one comes from another.
    """

    def __init__(self, take: Take, *, per_s: float, burst: float) -> None:
        self._take = take
        self._useless = Buckets(per_s, burst)

    def __call__(self, giver: PeerId, data: bytes) -> bool:
        now = trio.current_time()
        if self._useless.is_empty(giver, now):
            return False
        try:
            is_news = self._take(giver, data)
        except RemoteProtocolError:
            is_news = False
        if not is_news:
            self._useless.take(giver, now)
        return is_news
