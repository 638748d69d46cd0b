"""How peers behave: what their answers are worth, who rests, who is banned.

Whoever sends bytes that hash to nothing we ever asked from it is banned, with the reason. Whoever owes blocks and
sends nothing has stalled: it rests, and after several times it is given up.
"""

from __future__ import annotations

from typing import Final

from protocols.bitswap.ledger import Ledger, Peer
from protocols.ids import PeerId

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

    def ban(self, peer: PeerId, reason: str) -> None:
        """Nothing is asked from it any more; what it owes is asked elsewhere."""
        self.banned[peer] = reason
        self._ledger.release(peer, forget=True)
        self._ledger.peers.pop(peer, None)

    def fault(self, state: Peer, cid: bytes | None, size: int) -> str | None:
        """A block came from the peer: the reason to ban it, or None.

        Args:
          cid: computed from its bytes; None: an unknown hash.
        """
        if state.credit and (cid is None or cid not in state.credit):
            return f"sent {size} bytes that hash to no block it was asked for"
        if cid is None or state.credit.get(cid, 0) < 1:
            # Asked twice by accident, or by us before a restart.
            state.surplus += 1
            if state.surplus > MAX_SURPLUS:
                return f"sent {state.surplus} blocks that it was not asked for or had sent before"
        else:
            state.credit[cid] -= 1
        return None

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
        if state.strikes:
            return "does not answer"
        return "does not have it" if state.lacked else "was asked"
