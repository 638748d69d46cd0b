"""How peers behave: what their answers are worth, who rests, who is banned.

Bytes that hash to nothing we asked from their sender may be meant for a transfer that has ended, for our former self
or for another node that has our key: by themselves they are waste. Whoever sends them while it owes blocks is in
doubt: what it owes is asked elsewhere at once, and unless it sends a block that we did ask for within `DOUBT_S`, it
is banned, with the reason. Whoever owes blocks and sends nothing has stalled: it rests, and after several times it is
given up.
"""

from __future__ import annotations

from math import inf
from typing import Final

from protocols.bitswap.ledger import Ledger, Peer
from protocols.ids import PeerId

DOUBT_S: Final = 2.0  # a peer whose bytes hash to nothing has so long to show that they were meant for somebody else
TRUST_S: Final = 60.0  # from the last word that another node has our key
STALL_S: Final = 5.0  # a peer that owes blocks and sends not one byte for this long has stalled
MAX_STRIKES: Final = 3  # stalls in a row after which a peer is given up until it comes up again
REST_S: Final = 2.0  # pause after the first stall; doubled with each
RETRY_LACK_S: Final = 3.0  # a peer that did not have a block may have fetched it by then
MAX_SURPLUS: Final = 64  # blocks that a peer may send although they were answered already
MAX_LACKS: Final = 64  # a peer that lacks so many blocks rests before it is asked for others


class Conduct:
    """Judges peers, and writes into the ledger what follows."""

    def __init__(self, ledger: Ledger) -> None:
        self.banned: Final[dict[PeerId, str]] = {}  # peer -> why, a clause
        self._ledger = ledger
        self._liars: set[PeerId] = set()  # banned for what came unasked
        self._trusts_until = -inf

    def ban(self, peer: PeerId, reason: str, *, unasked: bool = False) -> None:
        """Nothing is asked from it any more; what it owes is asked elsewhere.

        `unasked`: for blocks that it was not asked for, in whatever number.
        """
        self.banned[peer] = reason
        if unasked:
            self._liars.add(peer)
        self._ledger.release(peer, forget=True)
        self._ledger.peers.pop(peer, None)

    def fault(self, peer: PeerId, state: Peer, cid: bytes | None, size: int, now: float) -> str | None:
        """A block came from the peer: the reason to ban it, or None.

        Args:
          cid: computed from its bytes; None: an unknown hash.
        """
        if cid is not None and state.credit.get(cid, 0) >= 1:
            state.credit[cid] -= 1
            state.doubted_until = inf
            return None
        if cid is None and state.credit:
            return f"sent {size} bytes under a hash that is not sha2-256, which no block of ours has"
        state.surplus += 1
        if state.surplus > MAX_SURPLUS:
            return f"sent {state.surplus} blocks that it was not asked for or had sent before"
        strange = cid not in state.credit and cid not in self._ledger.wants
        if strange and state.owes and now >= self._trusts_until:
            state.strange_bytes = size
            state.doubted_until = min(state.doubted_until, now + DOUBT_S)
            state.rests_until = max(state.rests_until, state.doubted_until)
            self._ledger.release(peer, forget=False)
        return None

    def find_liars(self, now: float) -> list[tuple[PeerId, str]]:
        """Peers in doubt that have sent nothing else, and why each is to be banned."""
        found = [(peer, state) for peer, state in self._ledger.peers.items() if state.doubted_until <= now]
        for _, state in found:
            state.doubted_until = inf
        return [(peer, _strange(state)) for peer, state in found]

    def trust(self, now: float) -> None:
        """Another node has our key: what comes may be meant for it, and what we were owed may have gone there."""
        self._trusts_until = now + TRUST_S
        for state in self._ledger.peers.values():
            state.doubted_until = inf
            state.surplus = 0
        for peer in self._liars:
            self.banned.pop(peer, None)
        self._liars.clear()

    def lacks(self, peer: PeerId, cid: bytes, now: float) -> None:
        """The peer says that it doesn't have this block: it may have fetched it by and by."""
        state = self._ledger.peers[peer]
        state.lacks[cid] = now + RETRY_LACK_S
        state.lacked = True
        if len(state.lacks) >= MAX_LACKS:
            state.rests_until = max(state.rests_until, now + RETRY_LACK_S)
        self._ledger.give_back(peer, state, cid)

    def find_stalled(self, now: float, cancels: dict[PeerId, list[bytes]]) -> list[tuple[PeerId, bool]]:
        """Peers that have stalled, and whether each is given up; `cancels` gets what is asked elsewhere now."""
        stalled = []
        for peer, state in self._ledger.peers.items():
            for cid in [cid for cid, until in state.lacks.items() if until <= now]:
                del state.lacks[cid]
            if not state.up or not (state.owes or state.haves):
                continue
            if now < max(state.heard, state.busy_since) + STALL_S:  # as the deadline is computed, to the last bit
                continue
            state.strikes += 1
            cancels.setdefault(peer, []).extend((*state.owes, *state.haves))
            given_up = state.strikes >= MAX_STRIKES
            state.rests_until = now + REST_S * 2 ** (state.strikes - 1)
            self._ledger.release(peer, forget=given_up)
            stalled.append((peer, given_up))
        return stalled

    def word(self, peer: PeerId) -> str:
        """What became of a provider, in words."""
        if peer in self.banned:
            return f"dropped, it {self.banned[peer]}"
        state = self._ledger.peers.get(peer)
        if state is None or not state.up:
            return "not reachable"
        if state.doubted_until < inf:
            return _strange(state)
        if state.strikes:
            return "does not answer"
        return "does not have it" if state.lacked else "was asked"


def _strange(state: Peer) -> str:
    return f"sent {state.strange_bytes} bytes that hash to no block it was asked for"
