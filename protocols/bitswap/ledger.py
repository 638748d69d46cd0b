"""What is wanted, who owes it, and what each peer has shown so far: the state that the asking side decides upon."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from math import inf
from typing import Final

from protocols.bitswap.width import Spread
from protocols.ids import PeerId

START_WINDOW_BYTES: Final = 4 << 20
MIN_WINDOW_BYTES: Final = 1 << 20
MAX_WINDOW_BYTES: Final = 16 << 20  # what one peer may owe us: bounds memory, and what a killed fetch repeats
WINDOW_S: Final = 0.5  # a window is what the peer sends in this time, so that it never runs dry
RATE_SAMPLE_S: Final = 0.05  # shortest busy time over which a rate is measured
RATE_MEMORY: Final = 0.6  # weight of the old rate
MAX_CREDIT: Final = 1 << 16  # CIDs remembered as asked, per peer


@dataclass(slots=True)
class Peer:
    """A peer that was ever up, or has sent something."""

    up: bool = False
    owes: dict[bytes, float] = field(default_factory=dict)  # want-block CID -> when it was asked
    owed_bytes: int = 0
    credit: dict[bytes, int] = field(default_factory=dict)  # CID ever asked -> blocks it may still send
    surplus: int = 0
    lacks: dict[bytes, float] = field(default_factory=dict)  # CID -> ask again from then on
    lacked: bool = False
    fresh: bool = True  # nothing was sent on this stream yet
    haves: dict[bytes, None] = field(default_factory=dict)  # open want-haves
    window: int = START_WINDOW_BYTES
    rate: float = 0.0  # bytes per second while it owed something; 0 is unknown
    sample_bytes: int = 0
    sample_s: float = 0.0
    busy_since: float = 0.0
    heard: float = 0.0
    strikes: int = 0
    rests_until: float = 0.0
    strange_bytes: int = 0  # of the block that hashes to nothing it was asked for, while it is in doubt
    doubted_until: float = inf  # then it is judged

    def ready(self, now: float) -> bool:
        return self.up and now >= self.rests_until

    def start(self, now: float) -> None:
        """It is about to be asked for something."""
        if not self.owes and not self.haves:
            self.busy_since = now

    def expect(self, cid: bytes) -> None:
        """It may send this block once more."""
        if len(self.credit) >= MAX_CREDIT:
            for old in [old for old in list(self.credit)[: MAX_CREDIT // 2] if old not in self.owes]:
                del self.credit[old]
        self.credit[cid] = self.credit.get(cid, 0) + 1

    def measure(self, size: int, now: float) -> None:
        """A block of `size` bytes came from it: its rate, and so its window."""
        self.sample_bytes += size
        self.sample_s += max(0.0, now - self.busy_since)
        self.busy_since = now
        if self.sample_s >= RATE_SAMPLE_S:
            rate = self.sample_bytes / self.sample_s
            self.rate = rate if not self.rate else RATE_MEMORY * self.rate + (1 - RATE_MEMORY) * rate
            self.sample_bytes, self.sample_s = 0, 0.0
            self.window = int(min(MAX_WINDOW_BYTES, max(MIN_WINDOW_BYTES, self.rate * WINDOW_S)))


@dataclass(slots=True)
class Session:
    """Something being fetched."""

    queue: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # wanted, asked from nobody
    peers: dict[PeerId, bool] = field(default_factory=dict)  # candidate -> certain


@dataclass(slots=True)
class Wanted:
    """A block that some session wants."""

    size: int
    sessions: dict[int, None]
    holders: dict[PeerId, None] = field(default_factory=dict)  # peers that owe it
    told: dict[PeerId, None] = field(default_factory=dict)  # peers where the wish is open, even if they lack it now


class Ledger:
    """All peers, all sessions, all wanted blocks."""

    def __init__(self) -> None:
        self.peers: Final[dict[PeerId, Peer]] = {}
        self.sessions: Final[dict[int, Session]] = {}
        self.wants: Final[dict[bytes, Wanted]] = {}
        self.spread: Final = Spread()  # how many peers are asked at once

    def want(self, session: int, blocks: dict[bytes, int]) -> None:
        """Blocks for a session: CID -> size."""
        known = self.sessions.setdefault(session, Session())
        for cid, size in blocks.items():
            want = self.wants.get(cid)
            if want is None:
                want = self.wants[cid] = Wanted(size, {})
            want.sessions[session] = None
            if not want.holders:
                known.queue[cid] = None

    def close(self, session: int, cancels: dict[PeerId, list[bytes]]) -> None:
        """What it wanted is not wanted any more, unless another one wants it; `cancels` gets whom to tell."""
        self.sessions.pop(session, None)
        for cid in [cid for cid, want in self.wants.items() if session in want.sessions]:
            want = self.wants[cid]
            del want.sessions[session]
            if not want.sessions:
                self.forget(cid, want, None, cancels)

    def forget(self, cid: bytes, want: Wanted, bearer: PeerId | None, cancels: dict[PeerId, list[bytes]]) -> None:
        """A block is not wanted any more: here, or its sessions have ended."""
        del self.wants[cid]
        for session in want.sessions:
            self.sessions[session].queue.pop(cid, None)
        for peer in want.told:
            state = self.peers[peer]
            state.haves.pop(cid, None)
            if state.owes.pop(cid, None) is not None:
                state.owed_bytes -= want.size
            if peer != bearer:
                cancels.setdefault(peer, []).append(cid)

    def release(self, peer: PeerId, *, forget: bool) -> None:
        """Put everything that a peer owes back to the front of the queues."""
        state = self.peers.get(peer)
        if state is None:
            return
        for want in self.wants.values():
            want.told.pop(peer, None)
        for cid in reversed(state.owes):
            want = self.wants[cid]
            del want.holders[peer]
            if not want.holders:
                self._requeue(cid, want)
        state.owes.clear()
        state.haves.clear()
        state.owed_bytes = 0
        if forget:
            state.doubted_until = inf
            self.spread.changed()
            state.up = False
            state.rate = 0.0
            state.window = START_WINDOW_BYTES

    def _requeue(self, cid: bytes, want: Wanted) -> None:
        for session in want.sessions:
            queue = self.sessions[session].queue
            queue[cid] = None
            queue.move_to_end(cid, last=False)

    def certain(self, peer: PeerId, cid: bytes) -> None:
        """The peer says that it has this block."""
        want = self.wants.get(cid)
        for session in want.sessions if want else ():
            if peer in self.sessions[session].peers:
                self.sessions[session].peers[peer] = True

    def give_back(self, peer: PeerId, state: Peer, cid: bytes) -> None:
        """The peer does not owe this block any more."""
        want = self.wants.get(cid)
        if state.owes.pop(cid, None) is None or want is None:
            return
        state.owed_bytes -= want.size
        want.holders.pop(peer, None)
        if not want.holders:
            self._requeue(cid, want)
