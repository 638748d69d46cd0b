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
from meshnode.membership.admissions import Admissions
from meshnode.membership.place import Place
from meshnode.membership.refusals import Refusal, Refusals
from meshnode.membership.registry import Registry, packed
from meshnode.net.bounded_taker import BoundedTaker
from meshnode.net.message_stream import CLOSE_S, MessageStream, open_messages
from meshnode.net.port import Host, PeerEvent, Stream
from meshnode.services.port import Strangers
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership import Credentials, HelloMachine, Member, Secrets, Standing, Untrusted
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
    SecretReceived,
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
    NewSecret,
    Roster,
)

ASK_ANYWAY_S: Final = 1.5  # the larger id waits this long for the smaller one's hello
RETRY_S: Final = 0.5  # between hellos that broke off
REDEEMED: Final = "the ticket was redeemed; a member comes back on a new connection"
SETTLE_S: Final = HELLO_S + CLOSE_S + 0.5  # a hello that ran out of time says so first
REVIEW_S: Final = 5.0  # expiry, and withdrawals that a command has put into the state file
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
        self._wall = wall
        self._credentials = Credentials(
            peer=self._us,
            name=introduction.name[:64],
            software=introduction.software[:32],
            chain=registry.membership.chain,
            secrets=registry.secrets,
        )
        self.renewed = Changes()  # our present secret
        self._admissions = Admissions(host, registry, health, wall)
        self._place = Place(lambda: registry.standing, health)
        self._granted: set[PeerId] = set()  # redeemed a ticket on its present connection
        self._refusals = Refusals(self._us, health, wall)
        self._greeting: dict[PeerId, trio.CancelScope] = {}
        self._streams: Counter[PeerId] = Counter()
        host.handle(PROTOCOL, self._answer, open_to_strangers=True)
        host.subscribe(TOPIC, BoundedTaker(self._take_gossip, per_s=1.0, burst=64.0))

    # What others read

    @property
    def changes(self) -> Changes:
        """See services/port.py; refusals count, too."""
        return self._admissions.changes

    def members(self) -> dict[PeerId, Member]:
        """Peers that are connected and have accepted us, as we have accepted them."""
        return dict(self._admissions.members)

    @property
    def secrets(self) -> Secrets:
        """Of our network, the present one first."""
        return self._registry.secrets

    @property
    def standing(self) -> Standing:
        """Our own roles and certificate. Raises Untrusted when they were withdrawn or have expired."""
        return self._registry.standing

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """Roles of any peer whose certificate we have seen and that holds now; empty for everybody else."""
        return self._registry.roles_of(peer)

    def is_founder(self, peer: PeerId) -> bool:
        """Whether the peer is a device for which a founder's key itself vouches."""
        return self._registry.is_founder(peer)

    def was_put_out(self, peer: PeerId) -> bool:
        """Whether the membership of a peer was withdrawn, and it has no newer one."""
        return self._registry.was_put_out(peer)

    def branch_of(self, peer: PeerId) -> PeerId:
        """Who answers for a peer where votes are weighed (see services/port.py)."""
        return self._registry.branch_of(peer)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Oldest first; repeats of the same peer and code are counted in one entry."""
        return self._refusals.all()

    async def admitted(self, peer: PeerId) -> Member:
        """Wait until a peer is a connected member. If cancelled: nothing happened."""
        while peer not in self._admissions.members:
            await self.changes.wait()
        return self._admissions.members[peer]

    # The service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Say hello to whoever connects, until cancelled."""
        self._registry.note_seen(self._us, self._credentials.name, self._wall())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._review_forever)
            nursery.start_soon(self._pass_on_secrets)
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
        self._admissions.left(event.peer, event.reason)

    async def _greet(self, peer: PeerId) -> None:
        """One connection: until the peer is a member, is refused, or its time is over."""
        with trio.CancelScope() as scope:
            self._greeting[peer] = scope
            broken = ""
            with trio.move_on_after(SETTLE_S):
                if self._us > peer:
                    with trio.move_on_after(ASK_ANYWAY_S):
                        await self.admitted(peer)
                while peer not in self._admissions.members:
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
            if peer not in self._admissions.members:
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
            remembers=self._registry.remembers,
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
                    self._admissions.admit(effect.member, effect.clock_offset_ms)
                case MutuallyAdmitted(behind):
                    if self._admissions.complete(peer):
                        self._refusals.clear(peer)
                    present = self._registry.secrets.present
                    if behind and present.renewal:
                        out.append(NewSecret(renewal=present.renewal, secret=present.secret))
                    out += self._registry.rosters(self._admissions.members)
                case SecretReceived(message):
                    self._take_secret(peer, message)
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

    async def _reject(self, peer: PeerId, rejected: Rejected) -> None:
        redeemed = peer in self._granted and rejected.by_us
        self._admissions.drop(peer)
        await self._host.disconnect(peer, REDEEMED if redeemed else rejected.reason)

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

    def _take_secret(self, peer: PeerId, new: NewSecret) -> None:
        try:
            changed = self._registry.take_secret(new)
        except Untrusted as no:
            _log.warning("secret.refused", peer=peer, reason=str(no))
            return
        if changed:
            _log.info("secret.renewed", giver=peer)
            self._use_secrets()

    def _use_secrets(self) -> None:
        """From now on we prove the present secret, and pass it on to members that are connected."""
        self._credentials = replace(self._credentials, secrets=self._registry.secrets)
        self.renewed.notify()

    async def _pass_on_secrets(self) -> None:
        """Another hello with every member, in which they learn what they lack."""
        while True:
            version = self.renewed.version
            await self.renewed.wait(version)
            async with trio.open_nursery() as nursery:
                for peer in self._admissions.members:
                    nursery.start_soon(self._greet_again, peer)

    async def _greet_again(self, peer: PeerId) -> None:
        try:
            rejected = await self._ask(peer)
        except (PeerUnreachable, Declined) as error:
            _log.debug("hello.failed", peer=peer, reason=str(error))  # at the next connection it learns it
        else:
            if rejected is not None:
                await self._reject(peer, rejected)

    async def _publish(self, withdrawals: tuple[bytes, ...]) -> None:
        for roster in packed(withdrawals):
            await self._host.publish(TOPIC, HELLO.encode(roster))

    async def withdraw(self, peer: PeerId, keeps: Iterable[str], reason: str) -> None:
        """Take roles from a member, or (nothing kept) put it out, here and everywhere.

        Raises IdentityError when this node may not do that, LocalProtocolError for a word that is no role.
        """
        for roster in packed(self._registry.withdrawal(peer, keeps, reason)):
            await self._publish(self._learn(roster))

    def _take_gossip(self, peer: PeerId, data: bytes) -> bool:
        roster = HELLO.decode(data)
        if not isinstance(roster, Roster) or not self._admissions.has_proved(peer):
            return False
        return bool(self._learn(roster))  # what we knew, we have passed on before

    async def _review_forever(self) -> None:
        while True:
            await trio.sleep(REVIEW_S)
            await self.take_up()
            self._review()

    async def take_up(self) -> None:
        """Take what a command has put into the state file, without waiting for the next look, and tell everybody."""
        withdrawals = self._registry.reload()
        if self._registry.reload_secrets():
            self._use_secrets()
        if withdrawals:
            self._review()
            self.changes.notify()
            await self._publish(withdrawals)

    def _review(self) -> None:
        """Judge every connected member anew, and ourselves."""
        self._place.look()
        for peer, no in self._admissions.fallen().items():
            self._note_refusal(peer, Rejected(code=no.code, reason=refusal_of(peer, str(no)), by_us=True))
            self._admissions.drop(peer)
