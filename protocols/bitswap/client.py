"""The asking side of Bitswap: which block is asked from whom, and what becomes of the answers.

One `Client` serves a whole node. Its *sessions* are the things being fetched (a file, a manifest): each has a
queue of wanted blocks and its own providers. What limits a peer is shared by all sessions: its window.

Rule 1: no clock, no randomness, no await. Time comes in as `now`, a wish to be woken goes out as `deadline`.
Rule 2: who is asked next is chosen in `choice.py`, how peers behave is judged in `conduct.py`, what both know
is in `ledger.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf

from protocols.bitswap.choice import END_GAME_S, Choice
from protocols.bitswap.ledger import Ledger, Peer, Session
from protocols.bitswap.messages import Buffer, Entry, Message, PresenceType
from protocols.bitswap.stalls import STALL_S, Conduct
from protocols.ids import PeerId


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
class Contested:
    """Another node has our key: nobody is accused for what comes unasked, for a while."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened until `deadline`."""


Event = PeerUp | PeerDown | Forget | Want | Offer | Close | Progress | Arrived | Found | Misbehaved | Contested | Tick


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


class Client:
    """Everything we want, and from whom."""

    def __init__(self) -> None:
        self.deadline: float | None = None  # seconds, same clock as `now`
        self.wasted_bytes = 0  # blocks that came although they were here already
        self._ledger = Ledger()
        self._peers, self._sessions, self._wants = self._ledger.peers, self._ledger.sessions, self._ledger.wants
        self._spread = self._ledger.spread
        self._choice = Choice(self._ledger)
        self._conduct = Conduct(self._ledger)
        self.banned = self._conduct.banned  # peer -> why, a clause

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at `now` (monotonic seconds); return what to do, in this order."""
        out: list[Effect] = []
        cancels: dict[PeerId, list[bytes]] = {}
        match event:
            case PeerUp(peer):
                self._peer_up(peer, now)
            case PeerDown(peer):
                self._ledger.release(peer, forget=True)
            case Forget(peer):
                self._ledger.release(peer, forget=True)
                self._peers.pop(peer, None)
                self.banned.pop(peer, None)
            case Want(session, blocks):
                self._ledger.want(session, blocks)
            case Offer(session, peers, certain):
                known = self._sessions.setdefault(session, Session())
                for peer in peers:
                    known.peers[peer] = certain or known.peers.get(peer, False)
            case Close(session):
                self._ledger.close(session, cancels)
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
                    self._ledger.forget(cid, want, None, cancels)
            case Misbehaved(peer, reason):
                self._ban(peer, reason, out)
            case Contested():
                self._conduct.trust(now)
            case Tick():
                for peer, reason in self._conduct.find_liars(now):
                    self._ban(peer, reason, out, unasked=True)
                out += [Stalled(peer, given_up) for peer, given_up in self._conduct.find_stalled(now, cancels)]
        self._ask(now, out, cancels)
        self._set_deadline(now)
        return out

    def asked(self, session: int) -> dict[PeerId, str]:
        """What became of every provider of a session, in words, for the error when nobody delivers."""
        known = self._sessions.get(session)
        return {} if known is None else {peer: self._conduct.word(peer) for peer in known.peers}

    def unasked(self, session: int, limit: int) -> tuple[bytes, ...]:
        """At most `limit` blocks that the session wants and that are asked from nobody, the best liked first."""
        known = self._sessions.get(session)
        return () if known is None else tuple(islice(known.queue, limit))

    def owed(self, peer: PeerId) -> int:
        """Bytes that are asked from a peer and have not come."""
        return self._peers[peer].owed_bytes if peer in self._peers else 0

    def awaited(self, peer: PeerId) -> bool:
        """Whether something of a peer is still to come: blocks, or what shows whether it lies."""
        state = self._peers.get(peer)
        return state is not None and bool(state.owes or state.doubted_until < inf)

    def rate(self, peer: PeerId) -> float:
        """Measured bytes per second of a peer; 0 when unknown."""
        return self._peers[peer].rate if peer in self._peers else 0.0

    def _peer_up(self, peer: PeerId, now: float) -> None:
        if peer in self.banned:
            return
        state = self._peers.setdefault(peer, Peer())
        state.up = True
        state.heard = now
        state.strikes = 0
        state.rests_until = 0.0
        state.fresh = True
        state.lacked = False
        state.lacks.clear()
        self._spread.changed()

    def _ban(self, peer: PeerId, reason: str, out: list[Effect], *, unasked: bool = False) -> None:
        if peer in self.banned:
            return
        self._conduct.ban(peer, reason, unasked=unasked)
        out.append(Banned(peer, reason))

    def _arrived(self, event: Arrived, now: float, out: list[Effect], cancels: dict[PeerId, list[bytes]]) -> None:
        peer = event.peer
        if peer in self.banned:
            return
        state = self._peers.setdefault(peer, Peer())
        state.heard = now
        for cid, data in event.blocks:
            reason = self._conduct.fault(peer, state, cid, len(data), now)
            if reason is not None:
                self._ban(peer, reason, out, unasked=True)
                return
            want = None if cid is None else self._wants.get(cid)
            if cid is None or (want is None and cid not in state.credit):
                self.wasted_bytes += len(data)
                continue
            state.strikes = 0
            state.rests_until = 0.0
            state.measure(len(data), now)
            self._spread.arrived(len(data))
            if want is None:
                self.wasted_bytes += len(data)
                continue
            out.append(Got(tuple(want.sessions), cid, data, peer))
            self._ledger.forget(cid, want, peer, cancels)
        for cid, kind in event.presences:
            state.haves.pop(cid, None)
            want = self._wants.get(cid)
            if want is None or peer not in want.told:
                continue  # an answer to nothing: nobody's harm
            if kind is PresenceType.HAVE:
                self._ledger.certain(peer, cid)
            else:
                self._conduct.lacks(peer, cid, now)

    def _ask(self, now: float, out: list[Effect], cancels: dict[PeerId, list[bytes]]) -> None:
        """Send what is to be cancelled, and what is asked now."""
        entries: dict[PeerId, list[Entry]] = {
            peer: [Entry(cid=cid, cancel=True) for cid in cids] for peer, cids in cancels.items()
        }
        self._choice.fill(entries, now)
        for peer, wishes in entries.items():
            state = self._peers.get(peer, Peer())
            if state.up:
                out.append(Send(peer, Message(entries=tuple(wishes), full=state.fresh)))
                state.fresh = False

    def _set_deadline(self, now: float) -> None:
        times = []
        for state in self._peers.values():
            if state.doubted_until < inf:
                times.append(state.doubted_until)
            if state.up and (state.owes or state.haves):
                times.append(max(state.heard, state.busy_since) + STALL_S)
            if state.up and self._wants:
                times.extend(t for t in (state.rests_until, *state.lacks.values()) if t > now)
        if self._wants and sum(1 for state in self._peers.values() if state.up) > 1:
            times.append(now + END_GAME_S)
            if self._spread.deadline > now:
                times.append(self._spread.deadline)
        self.deadline = max(now, min(times)) if times else None
