"""Who is let in: runs /meshnode/hello/1 on every connection, answers tickets.

Nothing but this protocol is served to a peer before `host.admit`. Who says hello: the peer with the smaller id,
at once; the other one after `ASK_ANYWAY_SECONDS`, for a restarted peer may not know that it is new to us. Two
hellos at the same time do no harm: the outcome is the same.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.membership.port import Membership, Signer
from meshnode.membership.registry import Registry, packed
from meshnode.net.port import Host, PeerEvent, Stream
from meshnode.services.port import Strangers
from meshnode.state.port import State
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership import Credentials, HelloMachine, Member, Standing, Untrusted
from protocols.membership.machine import (
    CLOSED,
    Begin,
    Deny,
    Effect,
    Expired,
    Grant,
    Joined,
    Learned,
    Redeem,
    Send,
    Settled,
    Trusted,
    Turned,
    refusal_of,
)
from protocols.membership.machine import State as Step
from protocols.membership.messages import (
    HELLO,
    HELLO_SECONDS,
    NONCE_BYTES,
    PROTOCOL,
    STRANGER,
    TOPIC,
    Join,
    Roster,
)
from protocols.membership.session import HelloSession, pack_message
from protocols.membership.trust import ordered_roles

ASK_ANYWAY_SECONDS: Final = 1.5  # the larger id waits this long for the smaller one's hello
RETRY_SECONDS: Final = 0.5  # between hellos that broke off
REDEEMED: Final = "the ticket was redeemed; a member comes back on a new connection"
FAREWELL_SECONDS: Final = 1.0  # a refused peer has this long to read why
SETTLE_SECONDS: Final = HELLO_SECONDS + FAREWELL_SECONDS + 0.5  # a hello that ran out of time says so first
REVIEW_SECONDS: Final = 5.0  # expiry, and withdrawals that a command has put into the state file
CLOCK_WARNING_MS: Final = 2_000  # intents are ranked by UTC milliseconds; more than this is worth a word
MAX_REFUSALS: Final = 64  # remembered for status
MAX_STREAMS: Final = 2  # hellos that one peer may have open with us

_log = get_logger("membership")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A peer that was not let in, or that did not let us in."""

    at_ms: int  # UTC milliseconds, the last time
    peer: PeerId
    code: str
    sentence: str
    by_us: bool
    count: int = 1


def _who(peer: PeerId, *, by_us: bool) -> str:
    return short(peer) if by_us else f"This node, by {short(peer)},"


class MembershipService:
    """Proves our membership to every peer, checks theirs, admits or refuses."""

    name = "membership"

    def __init__(
        self,
        host: Host,
        identity: Signer,
        membership: Membership,
        state: State,
        clock: Wall,
        software: str,
        *,
        node_name: str = "",
        health: Health | None = None,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        strangers: Strangers | None = None,
    ) -> None:
        """Registers the protocol and the topic: make it before `host.run`.

        `strangers`: asked about a peer that does not speak our protocol at all, which every node does: whether it
        stays, as a guest.

        Raises IdentityError when our own certificate does not hold.
        """
        self._host = host
        self._us = identity.peer_id
        self._registry = Registry(identity, membership, state, clock, random_bytes)
        self._trust = self._registry.trust
        self._clock = clock
        self._health = health
        self._random_bytes = random_bytes
        self._strangers = strangers
        self._credentials = Credentials(
            peer=self._us,
            name=(node_name or membership.name)[:64],
            software=software[:32],
            chain=membership.chain,
            secret=membership.secret,
        )
        self._members: dict[PeerId, Member] = {}  # connected and settled
        self._proven: dict[PeerId, Member] = {}  # admitted at the host
        self._granted: set[PeerId] = set()  # redeemed a ticket on its present connection
        self._offsets: dict[PeerId, int] = {}
        self._refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self._settling: dict[PeerId, trio.CancelScope] = {}
        self._streams: Counter[PeerId] = Counter()
        self.changes = Changes()
        host.handle(PROTOCOL, self._answer, open_to_strangers=True)
        self._gossip = host.subscribe(TOPIC, self._worth_passing)

    # What others read

    def members(self) -> dict[PeerId, Member]:
        """Peers that are connected and have accepted us, as we have accepted them."""
        return dict(self._members)

    @property
    def standing(self) -> Standing:
        """Our own roles and certificate. Raises Untrusted when they were withdrawn or have expired."""
        return self._registry.standing

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """Roles of any peer whose certificate we have seen and that holds now; empty for everybody else."""
        return self._registry.roles_of(peer)

    def clock_offsets(self) -> dict[PeerId, int]:
        """How far the clocks of connected members are ahead of ours, milliseconds."""
        return {peer: self._offsets[peer] for peer in self._members if peer in self._offsets}

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Oldest first; repeats of the same peer and code are counted in one entry."""
        return tuple(self._refusals)

    async def admitted(self, peer: PeerId) -> Member:
        """Wait until a peer is a connected member. If cancelled: nothing happened."""
        while peer not in self._members:
            await self.changes.wait()
        return self._members[peer]

    # The service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Say hello to whoever connects, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._review_forever)
            nursery.start_soon(self._listen)
            events = self._host.events()
            task_status.started()
            async for event in events:
                self._connection(event, nursery)

    def _connection(self, event: PeerEvent, nursery: trio.Nursery) -> None:
        scope = self._settling.pop(event.peer, None)
        if scope is not None:
            scope.cancel()
        if event.connected:
            nursery.start_soon(self._settle, event.peer)
            return
        self._granted.discard(event.peer)
        # The host keeps the admission: the id is proven anew by every connection, and we say hello again.
        if self._members.pop(event.peer, None) is not None:
            _log.info("member.left", peer=event.peer, reason=event.reason)
            self.changes.notify()

    async def _settle(self, peer: PeerId) -> None:
        """One connection: until the peer is a member, is refused, or its time is over."""
        with trio.CancelScope() as scope:
            self._settling[peer] = scope
            broken = ""
            with trio.move_on_after(SETTLE_SECONDS):
                if self._us > peer:
                    with trio.move_on_after(ASK_ANYWAY_SECONDS):
                        await self.admitted(peer)
                while peer not in self._members:
                    try:
                        turned = await self._ask(peer)
                    except (PeerUnreachable, Declined) as error:
                        broken = str(error)
                        speaks = not isinstance(error, Declined)
                        if not speaks and self._strangers is not None and self._strangers.take_in(peer):
                            return
                    else:
                        if turned is not None:
                            await self._turn_away(peer, turned)
                            return
                    with trio.move_on_after(RETRY_SECONDS):
                        await self.admitted(peer)
            if peer not in self._members:
                reason = f"it did not prove its membership within {HELLO_SECONDS:.0f} s; ask a member for a ticket"
                if broken:
                    reason += f" ({broken})"
                turned = Turned(code=STRANGER, reason=refusal_of(peer, reason), by_us=True)
                self._note_refusal(peer, turned)
                await self._turn_away(peer, turned)
        if self._settling.get(peer) is scope:
            del self._settling[peer]

    async def _ask(self, peer: PeerId) -> Turned | None:
        """Our hello. Raises PeerUnreachable, or Declined when the peer does not speak the protocol."""
        stream = await self._host.open_stream(peer, PROTOCOL)
        try:
            return await self._converse(stream, asking=True)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FAREWELL_SECONDS):
                await stream.aclose()

    async def _answer(self, stream: Stream) -> None:
        """The peer's hello, or its ticket."""
        peer = stream.peer
        if self._streams[peer] >= MAX_STREAMS:
            await stream.reset()
            return
        self._streams[peer] += 1
        try:
            turned = await self._converse(stream, asking=False)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
        if turned is not None:
            await self._turn_away(peer, turned)

    async def _converse(self, stream: Stream, *, asking: bool) -> Turned | None:
        """One stream to its end; how it was refused, or None.

        Raises PeerUnreachable when the stream breaks before the outcome is known.
        """
        peer, session = stream.peer, self._session(stream.peer)
        machine = session.machine
        turned: Turned | None = None
        try:
            out, facts = session.do(Begin(), *self._times()) if asking else (b"", ())
            until = math.inf
            while True:
                turned = await self._perform(stream, session, out, facts) or turned
                if machine.state in CLOSED and until == math.inf:
                    await stream.send_eof()
                    # The last word of the other side: its roster, or that it has read our refusal.
                    until = trio.current_time() + (
                        HELLO_SECONDS if machine.state is Step.ADMITTED else FAREWELL_SECONDS
                    )
                data: bytes | None = None
                with trio.move_on_at(until if machine.deadline is None else machine.deadline):
                    data = await stream.receive_some()
                if machine.state in CLOSED and not data:
                    return turned
                if data == b"":
                    raise PeerUnreachable(f"{short(peer)} hung up in the middle of the hello", peer=peer)
                if data is None:
                    out, facts = session.do(Expired(), *self._times())
                elif machine.state is Step.REFUSED:
                    out, facts = b"", ()  # the answer has been given, whatever it says now
                else:
                    out, facts = session.receive(data, *self._times())
        except PeerUnreachable:
            if machine.state in CLOSED:
                return turned
            raise
        except RemoteProtocolError as error:
            await stream.reset()
            if turned is None:
                reason = refusal_of(peer, f"it broke the rules of {PROTOCOL}: {error}")
                turned = Turned(code=STRANGER, reason=reason, by_us=True)
                self._note_refusal(peer, turned)
            return turned

    def _session(self, peer: PeerId) -> HelloSession:
        machine = HelloMachine(
            theirs=peer,
            credentials=self._credentials,
            trust=self._trust,
            nonce=self._random_bytes(NONCE_BYTES),
            now=trio.current_time(),
        )
        return HelloSession(machine)

    def _times(self) -> tuple[float, int]:
        return trio.current_time(), self._clock()

    async def _perform(
        self, stream: Stream, session: HelloSession, out: bytes, facts: tuple[Effect, ...]
    ) -> Turned | None:
        """Act on facts, then send: what a fact changes here must stand before the peer reads the answer."""
        peer = stream.peer
        turned: Turned | None = None
        pending = deque(facts)
        while pending:
            match fact := pending.popleft():
                case Trusted():
                    self._trust_peer(fact.member, fact.clock_offset_ms)
                case Settled():
                    self._welcome(peer)
                    out += b"".join(pack_message(roster) for roster in self._registry.rosters(self._members))
                case Redeem():
                    more, new = session.do(self._decide(peer, fact.join), *self._times())
                    out += more
                    pending.extend(new)
                case Learned():
                    await self._learn(fact.roster, pass_on=True)
                case Turned():
                    turned = fact
                    self._note_refusal(peer, fact)
                case Joined() | Send():
                    raise LocalProtocolError(
                        f"{type(fact).__name__} on a stream that neither joined nor sends itself"
                    )
        if out:
            await stream.send_all(out)
        return turned

    # Admission

    def _trust_peer(self, member: Member, offset_ms: int) -> None:
        self._proven[member.peer] = member
        self._offsets[member.peer] = offset_ms
        if self._registry.keep(member.peer, member.chain):
            self.changes.notify()
        self._host.admit(member.peer, True)
        if self._health is None:
            return
        if abs(offset_ms) > CLOCK_WARNING_MS:
            self._health.set("clock-off", peer=short(member.peer), seconds=round(abs(offset_ms) / 1000))
        else:
            self._health.clear("clock-off", peer=short(member.peer))

    def _welcome(self, peer: PeerId) -> None:
        member = self._proven[peer]
        if self._members.get(peer) != member:
            self._members[peer] = member
            _log.info("member.admitted", peer=peer, name=member.name, roles=ordered_roles(member.standing.roles))
            if self._health is not None:
                for by_us in (True, False):
                    self._health.clear("refused-peer", peer=_who(peer, by_us=by_us))
            self.changes.notify()

    async def _turn_away(self, peer: PeerId, turned: Turned) -> None:
        redeemed = peer in self._granted and turned.by_us
        self._drop(peer)
        await self._host.disconnect(peer, REDEEMED if redeemed else turned.reason)

    def _drop(self, peer: PeerId) -> None:
        if self._members.pop(peer, None) is not None:
            self.changes.notify()
        if self._proven.pop(peer, None) is not None:
            self._host.admit(peer, False)

    def _note_refusal(self, peer: PeerId, turned: Turned) -> None:
        """Keep it for people. A peer whose ticket was redeemed a moment ago is no stranger, only early."""
        if peer in self._granted and turned.by_us:
            return
        new = Refusal(at_ms=self._clock(), peer=peer, code=turned.code, sentence=turned.reason, by_us=turned.by_us)
        for old in self._refusals:
            if (old.peer, old.code, old.by_us) == (peer, turned.code, turned.by_us):
                self._refusals.remove(old)
                new = replace(new, count=old.count + 1)
                break
        self._refusals.append(new)
        self.changes.notify()
        _log.warning("peer.refused", peer=peer, code=turned.code, reason=turned.reason, by_us=turned.by_us)
        if self._health is not None:
            subject = peer if turned.by_us else self._us
            reason = turned.reason.removeprefix(refusal_of(subject, ""))
            self._health.set("refused-peer", peer=_who(peer, by_us=turned.by_us), reason=f"{reason}.")

    # What the registry learns

    def _decide(self, peer: PeerId, join: Join) -> Grant | Deny:
        try:
            granted = self._registry.grant(peer, join)
        except Declined as no:
            return Deny(no.code, str(no))
        self._granted.add(peer)
        self.changes.notify()
        return Grant(granted)

    async def _learn(self, roster: Roster, *, pass_on: bool) -> None:
        new_member, withdrawals = self._registry.learn(roster)
        if withdrawals:
            self._review()
        if new_member or withdrawals:
            self.changes.notify()
        if pass_on:
            await self._publish(withdrawals)

    async def _publish(self, withdrawals: tuple[bytes, ...]) -> None:
        for roster in packed(withdrawals):
            await self._host.publish(TOPIC, HELLO.encode(roster))

    async def withdraw(self, peer: PeerId, keeps: Iterable[str], reason: str) -> None:
        """Take roles from a member, or (nothing kept) put it out, here and everywhere.

        Raises IdentityError when this node may not do that, LocalProtocolError for a word that is no role.
        """
        await self._learn(Roster(withdrawals=(self._registry.withdrawal(peer, keeps, reason),)), pass_on=True)

    def _worth_passing(self, peer: PeerId, data: bytes) -> bool:
        try:
            return isinstance(HELLO.decode(data), Roster) and peer in self._proven
        except RemoteProtocolError:
            return False

    async def _listen(self) -> None:
        async for _, data in self._gossip:
            roster = HELLO.decode(data)  # the validator has decoded it before
            if isinstance(roster, Roster):
                await self._learn(roster, pass_on=False)

    async def _review_forever(self) -> None:
        while True:
            await trio.sleep(REVIEW_SECONDS)
            withdrawals = self._registry.reload()
            if withdrawals:
                self.changes.notify()
                await self._publish(withdrawals)
            self._review()

    def _review(self) -> None:
        """Judge every connected member anew: certificates expire, roles are withdrawn."""
        now = self._clock()
        for peer, member in list(self._proven.items()):
            try:
                standing = self._trust.check(member.chain, now)
            except Untrusted as no:
                self._note_refusal(peer, Turned(code=no.code, reason=refusal_of(peer, str(no)), by_us=True))
                self._drop(peer)
                continue
            if standing.roles != member.standing.roles:
                _log.info("member.changed", peer=peer, roles=ordered_roles(standing.roles))
                self._proven[peer] = replace(member, standing=standing)
                if peer in self._members:
                    self._members[peer] = self._proven[peer]
                    self.changes.notify()
