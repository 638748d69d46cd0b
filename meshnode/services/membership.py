"""Who is let in: runs /meshnode/hello/1 on every connection, answers tickets.

Nothing but this protocol is served to a peer before `host.admit`. Who says hello: the peer with the smaller id,
at once; the other one after `ASK_ANYWAY_S`, for a restarted peer may not know that it is new to us. Two
hellos at the same time do no harm: the outcome is the same.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.membership.refusals import Refusal, Refusals
from meshnode.membership.registry import Registry, packed
from meshnode.net.message_stream import CLOSE_S, MessageStream, open_messages
from meshnode.net.port import Host, PeerEvent, Stream
from meshnode.services.port import Strangers
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
    MutuallyAdmitted,
    Redeem,
    Rejected,
    RosterReceived,
    Send,
    Trusted,
    refusal_of,
)
from protocols.membership.machine import State as Step
from protocols.membership.messages import (
    HELLO,
    HELLO_S,
    NONCE_BYTES,
    PROTOCOL,
    STRANGER,
    TOPIC,
    Join,
    Message,
    Roster,
)
from protocols.membership.trust import ordered_roles

ASK_ANYWAY_S: Final = 1.5  # the larger id waits this long for the smaller one's hello
RETRY_S: Final = 0.5  # between hellos that broke off
REDEEMED: Final = "the ticket was redeemed; a member comes back on a new connection"
SETTLE_S: Final = HELLO_S + CLOSE_S + 0.5  # a hello that ran out of time says so first
REVIEW_S: Final = 5.0  # expiry, and withdrawals that a command has put into the state file
CLOCK_WARNING_MS: Final = 2_000  # intents are ranked by UTC milliseconds; more than this is worth a word
MAX_STREAMS: Final = 2  # hellos that one peer may have open with us

_log = get_logger("membership")


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What a node says of itself to every member."""

    name: str  # for people; its first 64 characters
    software: str  # its first 32 characters


class MembershipService:
    """Proves our membership to every peer, checks theirs, admits or refuses."""

    name = "membership"

    def __init__(
        self,
        host: Host,
        registry: Registry,
        strangers: Strangers,
        health: Health,
        wall: Wall,
        introduction: Introduction,
    ) -> None:
        """Registers the protocol and the topic: make it before `host.run`.

        `strangers`: asked about a peer that does not speak our protocol at all, which every node does.
        """
        self._host = host
        self._us = registry.us
        self._registry = registry
        self._strangers = strangers
        self._health = health
        self._wall = wall
        self._credentials = Credentials(
            peer=self._us,
            name=introduction.name[:64],
            software=introduction.software[:32],
            chain=registry.membership.chain,
            secret=registry.membership.secret,
        )
        self.changes = Changes()
        self._members: dict[PeerId, Member] = {}  # connected and mutually admitted
        self._proven: dict[PeerId, Member] = {}  # admitted at the host
        self._granted: set[PeerId] = set()  # redeemed a ticket on its present connection
        self._refusals = Refusals(self._us, health, wall)
        self._greeting: dict[PeerId, trio.CancelScope] = {}
        self._streams: Counter[PeerId] = Counter()
        host.handle(PROTOCOL, self._answer, open_to_strangers=True)
        host.subscribe(TOPIC, self._take_gossip)

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

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Oldest first; repeats of the same peer and code are counted in one entry."""
        return self._refusals.all()

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
            events = self._host.events()
            task_status.started()
            async for event in events:
                self._connection(event, nursery)

    def _connection(self, event: PeerEvent, nursery: trio.Nursery) -> None:
        scope = self._greeting.pop(event.peer, None)
        if scope is not None:
            scope.cancel()
        if event.connected:
            nursery.start_soon(self._greet, event.peer)
            return
        self._granted.discard(event.peer)
        # The host keeps the admission: the id is proven anew by every connection, and we say hello again.
        if self._members.pop(event.peer, None) is not None:
            _log.info("member.left", peer=event.peer, reason=event.reason)
            self.changes.notify()

    async def _greet(self, peer: PeerId) -> None:
        """One connection: until the peer is a member, is refused, or its time is over."""
        with trio.CancelScope() as scope:
            self._greeting[peer] = scope
            broken = ""
            with trio.move_on_after(SETTLE_S):
                if self._us > peer:
                    with trio.move_on_after(ASK_ANYWAY_S):
                        await self.admitted(peer)
                while peer not in self._members:
                    try:
                        rejected = await self._ask(peer)
                    except (PeerUnreachable, Declined) as error:
                        broken = str(error)
                        if isinstance(error, Declined) and self._strangers.take_in(peer):
                            return
                    else:
                        if rejected is not None:
                            await self._reject(peer, rejected)
                            return
                    with trio.move_on_after(RETRY_S):
                        await self.admitted(peer)
            if peer not in self._members:
                reason = f"it did not prove its membership within {HELLO_S:.0f} s; ask a member for a ticket"
                if broken:
                    reason += f" ({broken})"
                rejected = Rejected(code=STRANGER, reason=refusal_of(peer, reason), by_us=True)
                self._note_refusal(peer, rejected)
                await self._reject(peer, rejected)
        if self._greeting.get(peer) is scope:
            del self._greeting[peer]

    async def _ask(self, peer: PeerId) -> Rejected | None:
        """Our hello. Raises PeerUnreachable, or Declined when the peer does not speak the protocol."""
        async with open_messages(self._host, peer, PROTOCOL, HELLO) as messages:
            return await self._converse(messages, asking=True)

    async def _answer(self, stream: Stream) -> None:
        """The peer's hello, or its ticket."""
        peer = stream.peer
        if self._streams[peer] >= MAX_STREAMS:
            await stream.reset()
            return
        self._streams[peer] += 1
        try:
            rejected = await self._converse(MessageStream(stream, HELLO), asking=False)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
        if rejected is not None:
            await self._reject(peer, rejected)

    async def _converse(self, messages: MessageStream[Message], *, asking: bool) -> Rejected | None:
        """One stream to its end; how it was refused, or None.

        Raises PeerUnreachable when the stream breaks before the outcome is known.
        """
        peer = messages.peer
        machine = HelloMachine(
            theirs=peer,
            credentials=self._credentials,
            trust=self._registry.trust,
            nonce=self._registry.random_bytes(NONCE_BYTES),
            now=trio.current_time(),
        )
        rejected: Rejected | None = None
        try:
            effects = machine.handle(Begin(), *self._times()) if asking else ()
            until = math.inf
            while True:
                rejected = await self._perform(messages, machine, effects) or rejected
                if machine.state in CLOSED and until == math.inf:
                    await messages.send_eof()
                    # The last word of the other side: its roster, or that it has read our refusal.
                    until = trio.current_time() + (HELLO_S if machine.state is Step.ADMITTED else CLOSE_S)
                said: Message | Expired | None = Expired()
                with trio.move_on_at(until if machine.deadline is None else machine.deadline):
                    said = await messages.receive()
                if machine.state in CLOSED and (said is None or isinstance(said, Expired)):
                    return rejected
                if said is None:
                    raise PeerUnreachable(f"{short(peer)} hung up in the middle of the hello", peer=peer)
                # Once it is refused it has its answer, whatever it says now.
                effects = () if machine.state is Step.REFUSED else machine.handle(said, *self._times())
        except PeerUnreachable:
            if machine.state in CLOSED:
                return rejected
            raise
        except RemoteProtocolError as error:
            await messages.reset()
            if rejected is None:
                reason = refusal_of(peer, f"it broke the rules of {PROTOCOL}: {error}")
                rejected = Rejected(code=STRANGER, reason=reason, by_us=True)
                self._note_refusal(peer, rejected)
            return rejected

    def _times(self) -> tuple[float, int]:
        return trio.current_time(), self._wall()

    async def _perform(
        self, messages: MessageStream[Message], machine: HelloMachine, effects: tuple[Effect, ...]
    ) -> Rejected | None:
        """Act, then send: what an effect changes here must stand before the peer reads the answer."""
        peer = messages.peer
        rejected: Rejected | None = None
        out: list[Message] = []
        pending = deque(effects)
        while pending:
            match effect := pending.popleft():
                case Send(message):
                    out.append(message)
                case Trusted():
                    self._admit(effect.member, effect.clock_offset_ms)
                case MutuallyAdmitted():
                    self._complete(peer)
                    out += self._registry.rosters(self._members)
                case Redeem():
                    pending.extend(machine.handle(self._decide(peer, effect.join), *self._times()))
                case RosterReceived():
                    await self._publish(self._learn(effect.roster))
                case Rejected():
                    rejected = effect
                    self._note_refusal(peer, effect)
                case Joined():
                    raise LocalProtocolError("a ticket was granted on a stream that redeems none")
        if out:
            await messages.send(*out)
        return rejected

    # Admission

    def _admit(self, member: Member, offset_ms: int) -> None:
        """It proved its membership; whether it takes ours for proven we do not know yet."""
        self._proven[member.peer] = member
        if self._registry.keep(member.peer, member.chain):
            self.changes.notify()
        self._host.admit(member.peer, True)
        if abs(offset_ms) > CLOCK_WARNING_MS:
            self._health.set("clock-off", peer=short(member.peer), seconds=round(abs(offset_ms) / 1000))
        else:
            self._health.clear("clock-off", peer=short(member.peer))

    def _complete(self, peer: PeerId) -> None:
        """Both sides have admitted each other."""
        member = self._proven[peer]
        if self._members.get(peer) != member:
            self._members[peer] = member
            _log.info("member.admitted", peer=peer, name=member.name, roles=ordered_roles(member.standing.roles))
            self._refusals.clear(peer)
            self.changes.notify()

    async def _reject(self, peer: PeerId, rejected: Rejected) -> None:
        redeemed = peer in self._granted and rejected.by_us
        self._drop(peer)
        await self._host.disconnect(peer, REDEEMED if redeemed else rejected.reason)

    def _drop(self, peer: PeerId) -> None:
        if self._members.pop(peer, None) is not None:
            self.changes.notify()
        if self._proven.pop(peer, None) is not None:
            self._host.admit(peer, False)

    def _note_refusal(self, peer: PeerId, rejected: Rejected) -> None:
        """Keep it for people. A peer whose ticket was redeemed a moment ago is no stranger, only early."""
        if peer in self._granted and rejected.by_us:
            return
        self._refusals.note(peer, rejected)
        self.changes.notify()

    # What the registry learns

    def _decide(self, peer: PeerId, join: Join) -> Grant | Deny:
        try:
            granted = self._registry.grant(peer, join)
        except Declined as no:
            return Deny(no.code, str(no))
        self._granted.add(peer)
        self.changes.notify()
        return Grant(granted)

    def _learn(self, roster: Roster) -> tuple[bytes, ...]:
        """Take what holds; the withdrawals that were new."""
        new_member, withdrawals = self._registry.learn(roster)
        if withdrawals:
            self._review()
        if new_member or withdrawals:
            self.changes.notify()
        return withdrawals

    async def _publish(self, withdrawals: tuple[bytes, ...]) -> None:
        for roster in packed(withdrawals):
            await self._host.publish(TOPIC, HELLO.encode(roster))

    async def withdraw(self, peer: PeerId, keeps: Iterable[str], reason: str) -> None:
        """Take roles from a member, or (nothing kept) put it out, here and everywhere.

        Raises IdentityError when this node may not do that, LocalProtocolError for a word that is no role.
        """
        withdrawal = self._registry.withdrawal(peer, keeps, reason)
        await self._publish(self._learn(Roster(withdrawals=(withdrawal,))))

    def _take_gossip(self, peer: PeerId, data: bytes) -> bool:
        try:
            roster = HELLO.decode(data)
        except RemoteProtocolError:
            return False
        if not isinstance(roster, Roster) or peer not in self._proven:
            return False
        self._learn(roster)
        return True

    async def _review_forever(self) -> None:
        while True:
            await trio.sleep(REVIEW_S)
            withdrawals = self._registry.reload()
            if withdrawals:
                self.changes.notify()
                await self._publish(withdrawals)
            self._review()

    def _review(self) -> None:
        """Judge every connected member anew: certificates expire, roles are withdrawn."""
        now = self._wall()
        for peer, member in list(self._proven.items()):
            try:
                standing = self._registry.trust.check(member.chain, now)
            except Untrusted as no:
                self._note_refusal(peer, Rejected(code=no.code, reason=refusal_of(peer, str(no)), by_us=True))
                self._drop(peer)
                continue
            if standing.roles != member.standing.roles:
                _log.info("member.changed", peer=peer, roles=ordered_roles(standing.roles))
                self._proven[peer] = replace(member, standing=standing)
                if peer in self._members:
                    self._members[peer] = self._proven[peer]
                    self.changes.notify()
