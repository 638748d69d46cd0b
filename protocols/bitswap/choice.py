"""Which peer is asked next for which block.

A block is asked from one peer at a time; only when nothing is left to ask, a block that a slow peer owes is asked a
second time from a peer that would bring it at least twice as soon (end game). How many peers are used at once:
`width.py`.
"""

from __future__ import annotations

from typing import Final

from protocols.bitswap.ledger import Ledger, Peer
from protocols.bitswap.messages import Entry, WantType
from protocols.ids import PeerId

END_GAME_S: Final = 0.1  # how often the end game looks again, and the least that it must gain
END_GAME_GAIN: Final = 2.0  # a second peer is asked when it would be this many times faster
MAX_FIRST: Final = 4  # peers at a time that are asked for their first block, beside those in use
MAX_UNASKED_HAVES: Final = 4  # want-haves that are open at one peer that is only supposed to have something


class Choice:
    """Chooses from what the ledger says, and writes there what was asked."""

    def __init__(self, ledger: Ledger) -> None:
        self._peers, self._sessions, self._wants = ledger.peers, ledger.sessions, ledger.wants
        self._spread = ledger.spread

    def fill(self, entries: dict[PeerId, list[Entry]], now: float) -> None:
        """Fill the windows: one block to each peer in turn, so that distinct blocks spread over all of them."""
        # A window is filled up again when half of it is free: fewer, larger messages.
        hungry = [
            peer
            for peer, state in self._peers.items()
            if state.ready(now) and state.owed_bytes <= state.window // 2 and self._wants
        ]
        favoured = self._favoured(now) if hungry else {}
        while hungry:
            still = []
            for peer in hungry:
                entry = self._next_for(peer, favoured, now)
                if entry is not None:
                    entries.setdefault(peer, []).append(entry)
                    state = self._peers[peer]
                    if state.owed_bytes < state.window:
                        still.append(peer)
            hungry = still

    def _favoured(self, now: float) -> dict[int, set[PeerId]]:
        """Which peers each session asks now: no more than the spread allows, the fastest first.

        A peer that lacks blocks is asked besides: it can't take the place of one that has them all.
        """
        sure = {
            number: [peer for peer, certain in session.peers.items() if certain and self._ready(peer, now)]
            for number, session in self._sessions.items()
        }
        owed = sum(state.owed_bytes for state in self._peers.values())
        self._spread.decide(now, len(set().union(*sure.values())), owed)
        out = {}
        for number, peers in sure.items():
            whole = [peer for peer in peers if not self._peers[peer].lacks]
            whole.sort(key=lambda peer: (not self._peers[peer].owes, -self._peers[peer].rate))
            out[number] = {peer for peer in peers if self._peers[peer].lacks} | set(whole[: self._spread.width])
        return out

    def _is_new(self, state: Peer) -> bool:
        """Whether a peer that is spared is asked for one block, so that its speed and honesty are known early."""
        if state.credit:
            return False
        return sum(1 for peer in self._peers.values() if peer.owes and len(peer.credit) == 1) < MAX_FIRST

    def _ready(self, peer: PeerId, now: float) -> bool:
        return peer in self._peers and self._peers[peer].ready(now)

    def _next_for(self, peer: PeerId, favoured: dict[int, set[PeerId]], now: float) -> Entry | None:
        """The next thing to ask from a peer; it is marked as asked."""
        state = self._peers[peer]
        spared = False
        for number in list(self._sessions):
            session = self._sessions[number]
            certain = session.peers.get(peer)
            if certain is None or not session.queue:
                continue
            if certain and peer not in favoured[number] and not self._is_new(state):
                spared = True
                continue
            self._sessions[number] = self._sessions.pop(number)  # the next block is another session's turn
            cid = next((cid for cid in session.queue if state.lacks.get(cid, 0.0) <= now), None)
            if cid is None:
                continue
            if not certain:
                if len(state.haves) >= MAX_UNASKED_HAVES or cid in state.haves:
                    continue
                state.start(now)
                state.haves[cid] = None
                self._wants[cid].told[peer] = None
                state.expect(cid)  # small blocks come instead of a HAVE
                return Entry(cid=cid, want_type=WantType.HAVE, send_dont_have=True)
            return self._assign(peer, state, cid, now)
        return None if spared else self._end_game(peer, state, now)

    def _assign(self, peer: PeerId, state: Peer, cid: bytes, now: float) -> Entry:
        want = self._wants[cid]
        for number in want.sessions:
            self._sessions[number].queue.pop(cid, None)
        state.start(now)
        want.holders[peer] = None
        want.told[peer] = None
        state.owes[cid] = now
        state.owed_bytes += want.size
        state.lacks.pop(cid, None)
        state.expect(cid)
        return Entry(cid=cid, send_dont_have=True)

    def _end_game(self, peer: PeerId, state: Peer, now: float) -> Entry | None:
        """A block that another peer owes and that this one would bring much sooner; the latest one first."""
        if state.owes and not state.rate:
            return None
        best: tuple[float, bytes] | None = None
        for other_peer, other in self._peers.items():
            if other_peer == peer or not other.owes:
                continue
            ahead = 0
            for cid, asked in other.owes.items():
                want = self._wants[cid]
                ahead += want.size
                if len(want.holders) > 1 or state.lacks.get(cid, 0.0) > now:
                    continue
                if not any(self._sessions[number].peers.get(peer) for number in want.sessions):
                    continue
                # A peer without a measured rate is expected to need as long again as it has needed so far.
                waited = now - max(asked, other.busy_since)
                there = max(waited, ahead / other.rate) if other.rate else waited
                here = (state.owed_bytes + want.size) / state.rate if state.rate else 0.0
                if there > END_GAME_GAIN * here + END_GAME_S and (best is None or there > best[0]):
                    best = (there, cid)
        return None if best is None else self._assign(peer, state, best[1], now)
