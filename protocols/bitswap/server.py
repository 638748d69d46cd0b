"""The answering side of Bitswap: what peers want from us, and whose turn it is.

Rule 1: no I/O. Whether we hold a block, and how long it is, comes from a callable; the bytes are loaded by the
driver, which takes one `Answer` after the other and reports it done.
Rule 2: the next answer goes to the peer that got the least (start-time fair queueing over bytes), so one peer
that wants everything does not starve one that wants little; a peer has at most two answers under way, and those
that are not favoured have a few together, so that they can't keep the others waiting by reading nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from protocols.bitswap.messages import MAX_BLOCK_BYTES, Message, PresenceType, WantType
from protocols.ids import PeerId

MAX_WANTS: Final = 4096  # remembered per peer; what is above is not answered (go-bitswap: 1024)
MAX_PRESENCES: Final = 16384  # unsent presences per peer; wishes above are not answered
ANSWER_BYTES: Final = 1 << 20  # blocks gathered into one message: one of ours, many inner nodes
ANSWER_PRESENCES: Final = 1024  # presences in one message
SMALL_BLOCK_BYTES: Final = 1024  # a want-have for so small a block is answered with the block (go-bitswap)
GUEST_ANSWERS: Final = 12  # under way for all peers together that are not favoured
UNDER_WAY: Final = 2  # answers per peer: one is being sent while the next is loaded


@dataclass(frozen=True, slots=True)
class Answer:
    """One message to send: blocks to load, presences, and how much is still queued for the peer."""

    peer: PeerId
    blocks: tuple[bytes, ...]  # binary CIDs
    size: int  # bytes of the blocks
    presences: tuple[tuple[bytes, PresenceType], ...]
    pending_bytes: int


@dataclass(slots=True)
class _Want:
    priority: int
    kind: WantType
    dont_have: bool
    order: int
    size: int = -1  # bytes once it is queued


@dataclass(slots=True)
class _Peer:
    wants: dict[bytes, _Want] = field(default_factory=dict)
    ready: list[tuple[int, int, bytes]] = field(
        default_factory=list
    )  # heap of (-priority, order, CID), some cancelled
    queued: int = 0  # entries of `ready` that are not cancelled
    pending_bytes: int = 0
    presences: dict[bytes, PresenceType] = field(default_factory=dict)
    under_way: int = 0
    turn: int = 0  # virtual bytes at which its next answer starts

    @property
    def busy(self) -> bool:
        return bool(self.queued or self.presences)


class Server:
    """Wantlists of all peers and the order of our answers."""

    def __init__(
        self,
        size_of: Callable[[bytes], int | None],
        allows: Callable[[PeerId], bool] = lambda peer: True,
        favours: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        """
        Args:
          size_of: (binary CID) -> bytes of a block that we hold, None for one that we do not.
          allows: whether a peer may have blocks; to another one it looks as if we held none.
          favours: whether a peer comes before those that are not favoured.
        """
        self._size_of = size_of
        self._allows = allows
        self._favours = favours
        self._peers: dict[PeerId, _Peer] = {}
        self._order = 0
        self._turn = 0  # virtual bytes served

    def handle(self, peer: PeerId, message: Message) -> None:
        """Take the wishes of one message."""
        state = self._peers.setdefault(peer, _Peer(turn=self._turn))
        if not state.busy and not state.under_way:
            state.turn = max(state.turn, self._turn)
        if message.full:
            state.wants.clear()
            state.ready.clear()
            state.presences.clear()
            state.queued = state.pending_bytes = 0
        for entry in message.entries:
            if entry.cancel:
                self._cancel(state, entry.cid)
                continue
            full = len(state.wants) >= MAX_WANTS or len(state.presences) >= MAX_PRESENCES
            if full and entry.cid not in state.wants:
                continue
            self._cancel(state, entry.cid)
            self._order += 1
            want = _Want(entry.priority, entry.want_type, entry.send_dont_have, self._order)
            state.wants[entry.cid] = want
            self._answer(state, entry.cid, want, self._size_of(entry.cid) if self._allows(peer) else None)
        if not state.wants and not state.busy and not state.under_way:
            del self._peers[peer]

    def added(self, cids: Iterable[bytes]) -> bool:
        """Blocks that we hold from now on; answers the wishes that waited. Returns whether any did."""
        found = False
        for cid in cids:
            for peer, state in self._peers.items():
                want = state.wants.get(cid)
                if want is not None and want.size < 0 and self._allows(peer):
                    self._answer(state, cid, want, self._size_of(cid))
                    found = True
        return found

    def gone(self, peer: PeerId) -> None:
        """The peer is not connected any more: its wishes are forgotten."""
        self._peers.pop(peer, None)

    def next(self) -> Answer | None:
        """The next answer to load and send; None while nothing can be sent. Call `done` after each."""
        favoured = {peer for peer in self._peers if self._favours(peer)}
        guests = sum(state.under_way for peer, state in self._peers.items() if peer not in favoured)
        ready = [
            peer
            for peer, state in self._peers.items()
            if state.busy and state.under_way < UNDER_WAY and (peer in favoured or guests < GUEST_ANSWERS)
        ]
        if not ready:
            return None
        best = min(ready, key=lambda peer: (peer not in favoured, self._peers[peer].turn))
        state = self._peers[best]
        blocks, size = self._take(state)
        presences = tuple(list(state.presences.items())[:ANSWER_PRESENCES])
        for cid, _ in presences:
            del state.presences[cid]
        self._turn = max(self._turn, state.turn)
        state.turn += size + 64 * len(presences)
        state.under_way += 1
        return Answer(best, blocks, size, presences, state.pending_bytes)

    def done(self, peer: PeerId) -> None:
        """An answer to this peer was sent (or could not be)."""
        state = self._peers.get(peer)
        if state is None:
            return
        state.under_way = max(0, state.under_way - 1)
        if not state.wants and not state.busy and not state.under_way:
            del self._peers[peer]

    def waiting(self, peer: PeerId) -> int:
        """Bytes of blocks queued for a peer."""
        return self._peers[peer].pending_bytes if peer in self._peers else 0

    def _answer(self, state: _Peer, cid: bytes, want: _Want, size: int | None) -> None:
        if size is None or size > MAX_BLOCK_BYTES:
            if want.dont_have:
                state.presences[cid] = PresenceType.DONT_HAVE
            return  # the wish stays: it is answered when the block comes
        if want.kind is WantType.HAVE and size > SMALL_BLOCK_BYTES:
            state.presences[cid] = PresenceType.HAVE
            del state.wants[cid]
            return
        state.presences.pop(cid, None)
        want.size = size
        heapq.heappush(state.ready, (-want.priority, want.order, cid))
        state.queued += 1
        state.pending_bytes += size

    def _cancel(self, state: _Peer, cid: bytes) -> None:
        state.presences.pop(cid, None)
        want = state.wants.pop(cid, None)
        if want is None or want.size < 0:
            return
        state.queued -= 1
        state.pending_bytes -= want.size
        if len(state.ready) > 2 * MAX_WANTS:  # mostly cancelled ones: leave them out
            state.ready = [item for item in state.ready if self._live(state, item)]
            heapq.heapify(state.ready)

    @staticmethod
    def _live(state: _Peer, item: tuple[int, int, bytes]) -> bool:
        want = state.wants.get(item[2])
        return want is not None and want.order == item[1]

    def _take(self, state: _Peer) -> tuple[tuple[bytes, ...], int]:
        blocks: list[bytes] = []
        size = 0
        while state.queued:
            if not self._live(state, state.ready[0]):
                heapq.heappop(state.ready)
                continue
            cid = state.ready[0][2]
            length = state.wants[cid].size
            if blocks and size + length > ANSWER_BYTES:
                break
            heapq.heappop(state.ready)
            del state.wants[cid]
            blocks.append(cid)
            size += length
            state.queued -= 1
            state.pending_bytes -= length
        return tuple(blocks), size
