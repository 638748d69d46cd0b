"""How many connections and streams a host takes from whom.

Connections that have not proven who they are: few per address, and the newest comes first. Hundreds of silent sockets
from one machine cost that machine its oldest sockets; nobody else notices.

Whoever sends more frames or opens more streams than any node needs to is read more slowly for as long as that lasts:
what it sends waits on its own machine, and costs nothing here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from protocols.bucket import Bucket, Buckets
from protocols.ids import PeerId

PER_ADDRESS: Final = 32  # connections without a proof, from one IP address
IN_ALL: Final = 256  # of them
CALLS_PER_S: Final = 20.0  # connections from one IP address; each costs milliseconds before it is proven
CALL_BURST: Final = 400.0  # a hundred nodes on one machine, or behind one router, with their lanes
CALL_WAIT_S: Final = 5.0  # the longest wait of a caller beyond that
MAX_CONNECTIONS: Final = 1024  # of proven peers
PER_PEER: Final = 8
MAX_STRANGERS: Final = 64  # proven peers that are no members; the oldest makes room
STRANGER_S: Final = 60.0  # a peer that is not admitted by then is disconnected
STRANGER_STREAMS: Final = 16  # opened by the peer, per connection
GUEST_STREAMS: Final = 64  # go-bitswap opens one for every answer
MEMBER_STREAMS: Final = 128

# A frame takes some 5 microseconds, and one of a file is 64 KB; a stream that is opened takes a millisecond. Members
# open one for an exchange or for ever; of other IPFS nodes, which open one for each message, more are taken.
FRAMES_PER_S: Final = 4000.0
FRAME_BURST: Final = 20_000.0
MEMBER_STREAM_FRAMES: Final = 200.0  # 20 a second, 100 at once
STREAM_FRAMES: Final = 20.0
SLOWED_STREAMS: Final = 10  # that are taken of one record, which holds thousands, of a peer that is read more slowly
WASTE_BYTES: Final = 1024  # that nobody reads count as one frame
STILL_SLOW_S: Final = 10.0  # a peer counts as such for so long after a pause
SLOW_S: Final = 2.0  # the longest pause: shorter than the silence after which a peer is given up (heartbeat.py)


class Allowances:
    """What each peer may send, over all its connections: a new one gives no new allowance."""

    def __init__(self) -> None:
        self._buckets = Buckets(FRAMES_PER_S, FRAME_BURST)

    def of(self, peer: PeerId) -> Bucket:
        """In frames."""
        return self._buckets.of(peer, trio.current_time())


class PendingConnections:
    """Hands out a cancel scope per connection; the scope is cancelled to make room for a newer one."""

    def __init__(self, per_address: int = PER_ADDRESS, in_all: int = IN_ALL) -> None:
        self._per_address = per_address
        self._in_all = in_all
        self._waiting: dict[str, OrderedDict[trio.CancelScope, None]] = {}

    def __len__(self) -> int:
        return sum(len(scopes) for scopes in self._waiting.values())

    @contextmanager
    def enter(self, host: str, seconds: float) -> Iterator[trio.CancelScope]:
        """One connection from `host`, for `seconds` at most; `cancelled_caught`: its time or its place is gone."""
        own = self._waiting.setdefault(host, OrderedDict())
        if len(own) >= self._per_address:
            self._evict(host)
        elif len(self) >= self._in_all:
            self._evict(max(self._waiting, key=lambda other: len(self._waiting[other])))
        scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        self._waiting.setdefault(host, own)[scope] = None
        try:
            with scope:
                yield scope
        finally:
            self._leave(host, scope)

    def _evict(self, host: str) -> None:
        oldest = next(iter(self._waiting[host]))
        self._leave(host, oldest)
        oldest.cancel()

    def _leave(self, host: str, scope: trio.CancelScope) -> None:
        scopes = self._waiting.get(host)
        if scopes is not None:
            scopes.pop(scope, None)
            if not scopes:
                del self._waiting[host]
