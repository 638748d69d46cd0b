"""The asking side of Bitswap: which block is asked from whom, and what becomes of the answers.

One `Client` serves a whole node. Its *sessions* are the things being fetched (a file, a manifest): each has a
queue of wanted blocks and its own providers. What limits a peer is shared by all sessions: its window.

Rule 1: no clock, no randomness, no await. Time comes in as `now`, a wish to be woken goes out as `deadline`.
Rule 2: a block is asked from one peer at a time; only when nothing is left to ask, a block that a slow peer
owes is asked a second time from a peer that would bring it at least twice as soon (end game).
Rule 3: whoever sends bytes that hash to nothing we ever asked from it is banned, with the reason.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from protocols.bitswap.messages import Buffer, Entry, Message, PresenceType, WantType
from protocols.bitswap.width import Spread
from protocols.ids import PeerId

START_WINDOW_BYTES: Final = 4 << 20
MIN_WINDOW_BYTES: Final = 1 << 20
MAX_WINDOW_BYTES: Final = 16 << 20  # what one peer may owe us: bounds memory, and what a killed fetch repeats
WINDOW_S: Final = 0.5  # a window is what the peer sends in this time, so that it never runs dry
RATE_SAMPLE_S: Final = 0.05  # shortest busy time over which a rate is measured
RATE_MEMORY: Final = 0.6  # weight of the old rate
STALL_S: Final = 5.0  # a peer that owes blocks and sends not one byte for this long has stalled
MAX_STRIKES: Final = 3  # stalls in a row after which a peer is given up until it comes up again
REST_S: Final = 2.0  # pause after the first stall; doubled with each
RETRY_LACK_S: Final = 3.0  # a peer that did not have a block may have fetched it by then
END_GAME_S: Final = 0.1  # how often the end game looks again, and the least that it must gain
END_GAME_GAIN: Final = 2.0  # a second peer is asked when it would be this many times faster
MAX_SURPLUS: Final = 64  # blocks that a peer may send although they were answered already
MAX_LACKS: Final = 64  # a peer that lacks so many blocks rests before it is asked for others
MAX_CREDIT: Final = 1 << 16  # CIDs remembered as asked, per peer
MAX_FIRST: Final = 4  # peers at a time that are asked for their first block, beside those in use
MAX_UNASKED_HAVES: Final = 4  # want-haves that are open at one peer that is only supposed to have something


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A stream to the peer is open."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The stream is gone; what the peer owes is asked elsewhere."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Forget:
    """The peer is gone, and it is nobody whom we ask for blocks: nothing about it is kept."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Want:
    """Blocks for a session: CID -> bytes it will have (or an upper bound), in the order they are liked."""

    session: int
    blocks: dict[bytes, int]


@dataclass(frozen=True, slots=True)
class Offer:
    """Peers believed to hold the session's blocks. `certain` peers are asked for blocks at once, the others
    first whether they have one."""

    session: int
    peers: tuple[PeerId, ...]
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Close:
    """The session has ended, one way or the other."""

    session: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes came from the peer, whether or not they make a message yet."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Arrived:
    """Blocks and presences of one message. The CIDs were computed from the bytes; None: an unknown hash."""

    peer: PeerId
    blocks: Sequence[tuple[bytes | None, Buffer]]
    presences: Sequence[tuple[bytes, PresenceType]] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A block came from elsewhere than a peer; the driver has checked that its bytes have this CID."""

    cid: bytes
    data: Buffer


@dataclass(frozen=True, slots=True)
class Misbehaved:
    """The peer broke the encoding or a limit; the driver has read it."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened until `deadline`."""


Event = PeerUp | PeerDown | Forget | Want | Offer | Close | Progress | Arrived | Found | Misbehaved | Tick


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Got:
    """A wanted block whose bytes have the right hash. `data` is a view of the received message; `peer` is None
    for a block that was `Found`."""

    sessions: tuple[int, ...]
    cid: bytes
    data: Buffer
    peer: PeerId | None


@dataclass(frozen=True, slots=True)
class Banned:
    """The peer sent wrong bytes or broke the protocol; nothing is asked from it any more. The reason is a clause."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """The peer sent nothing for a while; its blocks are asked elsewhere. `given_up` after several times."""

    peer: PeerId
    given_up: bool


Effect = Send | Got | Banned | Stalled


@dataclass(slots=True)
class _Peer:
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

    def ready(self, now: float) -> bool:
        return self.up and now >= self.rests_until


@dataclass(slots=True)
class _Session:
    queue: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # wanted, asked from nobody
    peers: dict[PeerId, bool] = field(default_factory=dict)  # candidate -> certain


@dataclass(slots=True)
class _Want:
    size: int
    sessions: dict[int, None]
    holders: dict[PeerId, None] = field(default_factory=dict)  # peers that owe it
    told: dict[PeerId, None] = field(default_factory=dict)  # peers where the wish is open, even if they lack it now


class Client:
    """Everything we want, and from whom."""

    def __init__(self) -> None:
        self.deadline: float | None = None  # seconds, same clock as `now`
        self.banned: dict[PeerId, str] = {}
        self.wasted_bytes = 0  # blocks that came although they were here already
        self._peers: dict[PeerId, _Peer] = {}
        self._sessions: dict[int, _Session] = {}
        self._wants: dict[bytes, _Want] = {}
        self._spread = Spread()

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at `now` (monotonic seconds); return what to do, in this order."""
        out: list[Effect] = []
        cancels: dict[PeerId, list[bytes]] = {}
        match event:
            case PeerUp(peer):
                self._peer_up(peer, now)
            case PeerDown(peer):
                self._release(peer, forget=True)
            case Forget(peer):
                self._release(peer, forget=True)
                self._peers.pop(peer, None)
                self.banned.pop(peer, None)
            case Want(session, blocks):
                self._want(session, blocks)
            case Offer(session, peers, certain):
                known = self._sessions.setdefault(session, _Session())
                for peer in peers:
                    known.peers[peer] = certain or known.peers.get(peer, False)
            case Close(session):
                self._close(session, cancels)
            case Progress(peer):
                if peer in self._peers:
                    self._peers[peer].heard = now
                return out  # comes many times per block; a deadline that is too early does no harm
            case Arrived():
                self._arrived(event, now, out, cancels)
            case Found(cid, data):
                want = self._wants.get(cid)
                if want is not None:
                    out.append(Got(tuple(want.sessions), cid, data, None))
                    self._forget(cid, want, None, cancels)
            case Misbehaved(peer, reason):
                self._ban(peer, reason, out)
            case Tick():
                self._find_stalled(now, out, cancels)
        self._ask(now, out, cancels)
        self._set_deadline(now)
        return out

    def asked(self, session: int) -> dict[PeerId, str]:
        """What became of every provider of a session, in words, for the error when nobody delivers."""
        known = self._sessions.get(session)
        return {} if known is None else {peer: self._word(peer) for peer in known.peers}

    def unasked(self, session: int, limit: int) -> tuple[bytes, ...]:
        """At most `limit` blocks that the session wants and that are asked from nobody, the best liked first."""
        known = self._sessions.get(session)
        return () if known is None else tuple(islice(known.queue, limit))

    def owed(self, peer: PeerId) -> int:
        """Bytes that are asked from a peer and have not come."""
        return self._peers[peer].owed_bytes if peer in self._peers else 0

    def rate(self, peer: PeerId) -> float:
        """Measured bytes per second of a peer; 0 when unknown."""
        return self._peers[peer].rate if peer in self._peers else 0.0

    def _word(self, peer: PeerId) -> str:
        if peer in self.banned:
            return f"dropped, it {self.banned[peer]}"
        state = self._peers.get(peer)
        if state is None or not state.up:
            return "not reachable"
        if state.strikes:
            return "does not answer"
        return "does not have it" if state.lacked else "was asked"

    def _peer_up(self, peer: PeerId, now: float) -> None:
        if peer in self.banned:
            return
        state = self._peers.setdefault(peer, _Peer())
        state.up = True
        state.heard = now
        state.strikes = 0
        state.rests_until = 0.0
        state.fresh = True
        state.lacked = False
        state.lacks.clear()
        self._spread.changed()

    def _release(self, peer: PeerId, *, forget: bool) -> None:
        """Put everything that a peer owes back to the front of the queues."""
        state = self._peers.get(peer)
        if state is None:
            return
        for want in self._wants.values():
            want.told.pop(peer, None)
        for cid in reversed(state.owes):
            want = self._wants[cid]
            del want.holders[peer]
            if not want.holders:
                self._requeue(cid, want)
        state.owes.clear()
        state.haves.clear()
        state.owed_bytes = 0
        if forget:
            self._spread.changed()
            state.up = False
            state.rate = 0.0
            state.window = START_WINDOW_BYTES

    def _requeue(self, cid: bytes, want: _Want) -> None:
        for session in want.sessions:
            queue = self._sessions[session].queue
            queue[cid] = None
            queue.move_to_end(cid, last=False)

    def _ban(self, peer: PeerId, reason: str, out: list[Effect]) -> None:
        if peer in self.banned:
            return
        self.banned[peer] = reason
        self._release(peer, forget=True)
        self._peers.pop(peer, None)
        out.append(Banned(peer, reason))

    def _want(self, session: int, blocks: dict[bytes, int]) -> None:
        known = self._sessions.setdefault(session, _Session())
        for cid, size in blocks.items():
            want = self._wants.get(cid)
            if want is None:
                want = self._wants[cid] = _Want(size, {})
            want.sessions[session] = None
            if not want.holders:
                known.queue[cid] = None

    def _close(self, session: int, cancels: dict[PeerId, list[bytes]]) -> None:
        self._sessions.pop(session, None)
        for cid in [cid for cid, want in self._wants.items() if session in want.sessions]:
            want = self._wants[cid]
            del want.sessions[session]
            if not want.sessions:
                self._forget(cid, want, None, cancels)

    def _forget(self, cid: bytes, want: _Want, bearer: PeerId | None, cancels: dict[PeerId, list[bytes]]) -> None:
        """A block is not wanted any more: here, or its sessions have ended."""
        del self._wants[cid]
        for session in want.sessions:
            self._sessions[session].queue.pop(cid, None)
        for peer in want.told:
            state = self._peers[peer]
            state.haves.pop(cid, None)
            if state.owes.pop(cid, None) is not None:
                state.owed_bytes -= want.size
            if peer != bearer:
                cancels.setdefault(peer, []).append(cid)

    def _arrived(self, event: Arrived, now: float, out: list[Effect], cancels: dict[PeerId, list[bytes]]) -> None:
        peer = event.peer
        if peer in self.banned:
            return
        state = self._peers.setdefault(peer, _Peer())
        state.heard = now
        for cid, data in event.blocks:
            if state.credit and (cid is None or cid not in state.credit):
                self._ban(peer, f"sent {len(data)} bytes that hash to no block it was asked for", out)
                return
            if cid is None or state.credit.get(cid, 0) < 1:
                # Asked twice by accident, or by us before a restart.
                state.surplus += 1
                if state.surplus > MAX_SURPLUS:
                    self._ban(peer, f"sent {state.surplus} blocks that it was not asked for or had sent before", out)
                    return
            else:
                state.credit[cid] -= 1
            if cid is None:
                continue
            state.strikes = 0
            state.rests_until = 0.0
            self._measure(state, len(data), now)
            self._spread.arrived(len(data))
            want = self._wants.get(cid)
            if want is None:
                self.wasted_bytes += len(data)
                continue
            out.append(Got(tuple(want.sessions), cid, data, peer))
            self._forget(cid, want, peer, cancels)
        for cid, kind in event.presences:
            state.haves.pop(cid, None)
            want = self._wants.get(cid)
            if want is None or peer not in want.told:
                continue  # an answer to nothing: nobody's harm
            if kind is PresenceType.HAVE:
                self._certain(peer, cid)
            else:
                state.lacks[cid] = now + RETRY_LACK_S
                state.lacked = True
                if len(state.lacks) >= MAX_LACKS:
                    state.rests_until = max(state.rests_until, now + RETRY_LACK_S)
                self._return(peer, state, cid)

    def _certain(self, peer: PeerId, cid: bytes) -> None:
        want = self._wants.get(cid)
        for session in want.sessions if want else ():
            if peer in self._sessions[session].peers:
                self._sessions[session].peers[peer] = True

    def _return(self, peer: PeerId, state: _Peer, cid: bytes) -> None:
        """The peer does not owe this block any more."""
        want = self._wants.get(cid)
        if state.owes.pop(cid, None) is None or want is None:
            return
        state.owed_bytes -= want.size
        want.holders.pop(peer, None)
        if not want.holders:
            self._requeue(cid, want)

    def _measure(self, state: _Peer, size: int, now: float) -> None:
        state.sample_bytes += size
        state.sample_s += max(0.0, now - state.busy_since)
        state.busy_since = now
        if state.sample_s >= RATE_SAMPLE_S:
            rate = state.sample_bytes / state.sample_s
            state.rate = rate if not state.rate else RATE_MEMORY * state.rate + (1 - RATE_MEMORY) * rate
            state.sample_bytes, state.sample_s = 0, 0.0
            state.window = int(min(MAX_WINDOW_BYTES, max(MIN_WINDOW_BYTES, state.rate * WINDOW_S)))

    def _find_stalled(self, now: float, out: list[Effect], cancels: dict[PeerId, list[bytes]]) -> None:
        for peer, state in self._peers.items():
            for cid in [cid for cid, until in state.lacks.items() if until <= now]:
                del state.lacks[cid]
            if not state.up or not (state.owes or state.haves):
                continue
            if now - max(state.heard, state.busy_since) < STALL_S:
                continue
            state.strikes += 1
            cancels.setdefault(peer, []).extend((*state.owes, *state.haves))
            given_up = state.strikes >= MAX_STRIKES
            state.rests_until = now + REST_S * 2 ** (state.strikes - 1)
            self._release(peer, forget=given_up)
            out.append(Stalled(peer, given_up))

    def _ask(self, now: float, out: list[Effect], cancels: dict[PeerId, list[bytes]]) -> None:
        """Fill the windows: one block to each peer in turn, so that distinct blocks spread over all of them."""
        entries: dict[PeerId, list[Entry]] = {
            peer: [Entry(cid=cid, cancel=True) for cid in cids] for peer, cids in cancels.items()
        }
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
        for peer, wishes in entries.items():
            state = self._peers.get(peer, _Peer())
            if state.up:
                out.append(Send(peer, Message(entries=tuple(wishes), full=state.fresh)))
                state.fresh = False

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

    def _is_new(self, state: _Peer) -> bool:
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
                self._start(state, now)
                state.haves[cid] = None
                self._wants[cid].told[peer] = None
                self._expect(state, cid)  # small blocks come instead of a HAVE
                return Entry(cid=cid, want_type=WantType.HAVE, send_dont_have=True)
            return self._assign(peer, state, cid, now)
        return None if spared else self._end_game(peer, state, now)

    def _start(self, state: _Peer, now: float) -> None:
        if not state.owes and not state.haves:
            state.busy_since = now

    def _expect(self, state: _Peer, cid: bytes) -> None:
        if len(state.credit) >= MAX_CREDIT:
            for old in [old for old in list(state.credit)[: MAX_CREDIT // 2] if old not in state.owes]:
                del state.credit[old]
        state.credit[cid] = state.credit.get(cid, 0) + 1

    def _assign(self, peer: PeerId, state: _Peer, cid: bytes, now: float) -> Entry:
        want = self._wants[cid]
        for number in want.sessions:
            self._sessions[number].queue.pop(cid, None)
        self._start(state, now)
        want.holders[peer] = None
        want.told[peer] = None
        state.owes[cid] = now
        state.owed_bytes += want.size
        state.lacks.pop(cid, None)
        self._expect(state, cid)
        return Entry(cid=cid, send_dont_have=True)

    def _end_game(self, peer: PeerId, state: _Peer, now: float) -> Entry | None:
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

    def _set_deadline(self, now: float) -> None:
        times = []
        for state in self._peers.values():
            if state.up and (state.owes or state.haves):
                times.append(max(state.heard, state.busy_since) + STALL_S)
            if state.up and self._wants:
                times.extend(t for t in (state.rests_until, *state.lacks.values()) if t > now)
        if self._wants and sum(1 for state in self._peers.values() if state.up) > 1:
            times.append(now + END_GAME_S)
            if self._spread.deadline > now:
                times.append(self._spread.deadline)
        self.deadline = max(now, min(times)) if times else None
