"""Who is let in: runs /meshnode/hello/1 on every connection, keeps the ledger's side of tickets.

Nothing but this protocol is served to a peer before `host.admit`. Who says hello: the peer with the smaller id,
at once; the other one after `ASK_ANYWAY_SECONDS`, for a restarted peer may not know that it is new to us. Two
hellos at the same time do no harm: the outcome is the same.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, IdentityError, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.net.port import Host, PeerEvent, Stream
from meshnode.state.port import Membership, Signer, State, keep_withdrawal, restore_withdrawals
from protocols.codec import decode, encode
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
)
from protocols.membership.machine import State as Step
from protocols.membership.messages import (
    ADMIN,
    FORBIDDEN,
    HELLO,
    HELLO_SECONDS,
    MAX_CHAIN,
    MEMBER,
    NONCE_BYTES,
    PROTOCOL,
    STRANGER,
    TOPIC,
    Certificate,
    Chain,
    Granted,
    Join,
    Roster,
    Withdrawal,
)
from protocols.membership.sealing import NONCE_BYTES as SEAL_NONCE_BYTES
from protocols.membership.sealing import seal_secret
from protocols.membership.session import HelloSession, pack_message
from protocols.membership.trust import ordered_roles, sign_certificate, sign_withdrawal

ASK_ANYWAY_SECONDS: Final = 1.5  # the larger id waits this long for the smaller one's hello
RETRY_SECONDS: Final = 0.5  # between hellos that broke off
FAREWELL_SECONDS: Final = 1.0  # a refused peer has this long to read why
SETTLE_SECONDS: Final = HELLO_SECONDS + FAREWELL_SECONDS + 0.5  # a hello that ran out of time says so first
REVIEW_SECONDS: Final = 5.0  # expiry, and withdrawals that a command has put into the state file
CLOCK_WARNING_MS: Final = 2_000  # intents are ranked by UTC milliseconds; more than this is worth a word
MAX_REFUSALS: Final = 64  # remembered for status
MAX_MEMBERS: Final = 1024  # remembered certificates
MAX_STREAMS: Final = 2  # hellos that one peer may have open with us
_CHAINS: Final = 24  # in one Roster: about 1 KiB each, 64 KiB allowed
_WITHDRAWALS: Final = 16  # in one Roster: at most 2 KiB each

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
    ) -> None:
        """Registers the protocol and the topic: make it before `host.run`.

        Raises IdentityError when our own certificate does not hold.
        """
        self._host = host
        self._key = identity.signing_key
        self._us = identity.peer_id
        self._membership = membership
        self._state = state
        self._clock = clock
        self._health = health
        self._random_bytes = random_bytes
        self._trust = membership.trust()
        restore_withdrawals(self._trust, state, clock())
        try:
            standing = self._trust.check(membership.chain, clock())
        except Untrusted as error:
            raise IdentityError(f"the membership of this node does not hold: {error}") from error
        if standing.peer != self._us:
            raise IdentityError(
                f"the certificate of this node is of {short(standing.peer)}, its key of {short(self._us)}; restore "
                "the key that belongs to the certificate, or join again with a new ticket"
            )
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
        self._chains: dict[PeerId, tuple[bytes, ...]] = {}  # everybody's certificates, connected or not
        self._offsets: dict[PeerId, int] = {}
        self._refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self._settling: dict[PeerId, trio.CancelScope] = {}
        self._streams: Counter[PeerId] = Counter()
        self._version = 0
        self._changed = trio.Event()
        self._load_chains()
        host.handle(PROTOCOL, self._answer, open_to_strangers=True)
        self._gossip = host.subscribe(TOPIC, self._worth_passing)

    # What others read

    def members(self) -> dict[PeerId, Member]:
        """Peers that are connected and have accepted us, as we have accepted them."""
        return dict(self._members)

    @property
    def standing(self) -> Standing:
        """Our own roles and certificate. Raises Untrusted when they were withdrawn or have expired."""
        return self._trust.check(self._membership.chain, self._clock())

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """Roles of any peer whose certificate we have seen and that holds now; empty for everybody else."""
        chain = self._membership.chain if peer == self._us else self._chains.get(peer)
        if chain is None:
            return frozenset()
        try:
            return self._trust.check(chain, self._clock()).roles
        except Untrusted:
            return frozenset()

    def clock_offsets(self) -> dict[PeerId, int]:
        """How far the clocks of connected members are ahead of ours, milliseconds."""
        return {peer: self._offsets[peer] for peer in self._members if peer in self._offsets}

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Oldest first; repeats of the same peer and code are counted in one entry."""
        return tuple(self._refusals)

    @property
    def version(self) -> int:
        """Goes up whenever something that can be read here changes: members, roles, refusals."""
        return self._version

    async def changed(self, version: int) -> int:
        """Wait until `version` is not the current one any more; the current one. If cancelled: nothing happened."""
        while self._version == version:
            await self._changed.wait()
        return self._version

    async def admitted(self, peer: PeerId) -> Member:
        """Wait until a peer is a connected member. If cancelled: nothing happened."""
        while peer not in self._members:
            await self._changed.wait()
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
            self._note_change()

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
                    else:
                        if turned is not None:
                            await self._turn_away(peer, turned)
                            return
                    with trio.move_on_after(RETRY_SECONDS):
                        await self.admitted(peer)
            if peer not in self._members:
                reason = f"{short(peer)} did not prove its membership within {HELLO_SECONDS:.0f} s"
                if broken:
                    reason += f" ({broken})"
                await self._turn_away(
                    peer, Turned(code=STRANGER, reason=f"{reason}; ask a member for a ticket", by_us=True)
                )
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
            reason = f"{short(peer)} broke the rules of {PROTOCOL}: {error}"
            return turned or Turned(code=STRANGER, reason=reason, by_us=True)

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
                    out += b"".join(pack_message(roster) for roster in self._rosters())
                case Redeem():
                    more, new = session.do(self._decide(peer, fact.join), *self._times())
                    out += more
                    pending.extend(new)
                case Learned():
                    await self._learn(fact.roster, pass_on=True)
                case Turned():
                    turned = fact
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
        self._keep_chain(member.peer, member.chain)
        self._host.admit(member.peer, True)
        if abs(offset_ms) > CLOCK_WARNING_MS and self._health is not None:
            self._health.set("clock-off", peer=short(member.peer), seconds=round(abs(offset_ms) / 1000))

    def _welcome(self, peer: PeerId) -> None:
        member = self._proven[peer]
        if self._members.get(peer) != member:
            self._members[peer] = member
            _log.info("member.admitted", peer=peer, name=member.name, roles=ordered_roles(member.standing.roles))
            self._note_change()

    def _note_change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = trio.Event()

    async def _turn_away(self, peer: PeerId, turned: Turned) -> None:
        if peer in self._granted and turned.by_us:
            reason = "the ticket was redeemed; a member comes back on a new connection"
        else:
            reason = turned.reason
            self._note_refusal(peer, turned)
        self._drop(peer)
        await self._host.disconnect(peer, reason)

    def _drop(self, peer: PeerId) -> None:
        if self._members.pop(peer, None) is not None:
            self._note_change()
        if self._proven.pop(peer, None) is not None:
            self._host.admit(peer, False)

    def _note_refusal(self, peer: PeerId, turned: Turned) -> None:
        new = Refusal(at_ms=self._clock(), peer=peer, code=turned.code, sentence=turned.reason, by_us=turned.by_us)
        for old in self._refusals:
            if (old.peer, old.code, old.by_us) == (peer, turned.code, turned.by_us):
                self._refusals.remove(old)
                new = replace(new, count=old.count + 1)
                break
        self._refusals.append(new)
        self._note_change()
        _log.warning("peer.refused", peer=peer, code=turned.code, reason=turned.reason, by_us=turned.by_us)
        if self._health is not None:
            who = short(peer) if turned.by_us else f"This node, by {short(peer)},"
            self._health.set("refused-peer", peer=who, reason=turned.reason)

    # Tickets

    def _decide(self, peer: PeerId, join: Join) -> Grant | Deny:
        try:
            return Grant(self._grant(peer, join))
        except Declined as no:
            return Deny(no.code, str(no))

    def _grant(self, peer: PeerId, join: Join) -> Granted:
        now = self._clock()
        try:
            ours = self.standing
        except Untrusted as error:
            raise Declined(FORBIDDEN, f"the node that made the ticket is no member any more: {error}") from error
        if ADMIN not in ours.roles or ours.distance >= MAX_CHAIN:
            raise Declined(
                FORBIDDEN,
                "this node may not invite; a ticket is redeemed at the node that made it, which must be an admin",
            )
        invite = self._state.redeem(join.invite, join.secret, peer, now, not_before_ms=self._trust.withdrawn_ms(peer))
        certificate = Certificate(
            network=self._trust.id,
            peer=peer,
            roles=ordered_roles(set(invite.roles) & ours.roles),
            issued_ms=now,
            expires_ms=now + invite.member_ms if invite.member_ms else 0,
            serial=self._state.next_serial(),
        )
        chain = (*self._membership.chain, sign_certificate(self._key, certificate))
        self._granted.add(peer)
        self._keep_chain(peer, chain)
        _log.info("member.invited", peer=peer, name=join.name, roles=certificate.roles)
        sealed = seal_secret(
            self._membership.secret,
            invite=join.invite,
            invite_secret=join.secret,
            joiner=peer,
            nonce=self._random_bytes(SEAL_NONCE_BYTES),
        )
        return Granted(network=self._membership.network_record, chain=chain, sealed=sealed, wall_ms=now)

    # Certificates and withdrawals of others

    def _load_chains(self) -> None:
        for peer, data in self._state.records(MEMBER).items():
            with suppress(RemoteProtocolError):  # of another version; a hello brings it again
                self._chains[PeerId(peer)] = decode(Chain, data).certificates

    def _keep_chain(self, peer: PeerId, chain: tuple[bytes, ...]) -> bool:
        """Remember a chain that holds, unless a newer one is known; whether it was new."""
        known = self._chains.get(peer)
        if known == chain or (known is None and len(self._chains) >= MAX_MEMBERS):
            return False
        if known is not None and self._age(known) >= self._age(chain):
            return False
        self._chains[peer] = chain
        self._state.put_record(MEMBER, peer, encode(Chain(certificates=chain)))
        self._note_change()
        return True

    def _age(self, chain: tuple[bytes, ...]) -> tuple[int, int]:
        """Order of certificates of one peer; one that does not hold is older than all."""
        try:
            certificate = self._trust.check(chain, self._clock()).certificate
        except Untrusted:
            return (0, 0)
        return (certificate.issued_ms, certificate.serial)

    def _rosters(self) -> Iterator[Roster]:
        """What we know, connected members first; at most 10 messages of members and 6 of withdrawals."""
        peers = sorted(self._chains, key=lambda peer: (peer not in self._members, peer))
        chains = [Chain(certificates=self._chains[peer]) for peer in peers]
        for first in range(0, min(len(chains), 10 * _CHAINS), _CHAINS):
            yield Roster(members=tuple(chains[first : first + _CHAINS]))
        withdrawals = self._trust.withdrawals()[-6 * _WITHDRAWALS :]
        for first in range(0, len(withdrawals), _WITHDRAWALS):
            yield Roster(withdrawals=withdrawals[first : first + _WITHDRAWALS])

    async def _learn(self, roster: Roster, *, pass_on: bool) -> None:
        """Take what holds; the rest is ignored, for the sender may not have known."""
        now = self._clock()
        for chain in roster.members:
            with suppress(Untrusted):
                standing = self._trust.check(chain.certificates, now)
                if standing.peer != self._us:
                    self._keep_chain(standing.peer, chain.certificates)
        news = []
        for data in roster.withdrawals:
            with suppress(Untrusted):
                if self._trust.withdraw(data, now) is not None:
                    keep_withdrawal(self._state, data)
                    news.append(data)
        if news:
            self._review()
            self._note_change()
            if pass_on:
                await self._host.publish(TOPIC, HELLO.encode(Roster(withdrawals=tuple(news))))

    async def withdraw(self, peer: PeerId, keeps: Iterable[str], reason: str) -> None:
        """Take roles from a member, or (nothing kept) put it out, here and everywhere.

        Raises IdentityError when this node may not do that.
        """
        now, kept = self._clock(), ordered_roles(keeps)
        try:
            ours = self.standing
        except Untrusted as error:
            raise IdentityError(f"the membership of this node does not hold: {error}") from error
        if ADMIN not in ours.roles:
            raise IdentityError("this node may not withdraw memberships: its certificate lacks the role admin")
        chain = self._chains.get(peer)
        if chain is not None and len(chain) <= ours.distance:
            raise IdentityError(
                f"{short(peer)} is as near to the founder as this node, so this node can't take its rights back. "
                "Do it on the node that holds the founder's key."
            )
        word = Withdrawal(
            network=self._trust.id,
            peer=peer,
            keeps=kept,
            issued_ms=now,
            reason=reason[:200],
            chain=self._membership.chain,
        )
        await self._learn(Roster(withdrawals=(sign_withdrawal(self._key, word),)), pass_on=True)

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
            known = set(self._trust.withdrawals())
            if restore_withdrawals(self._trust, self._state, self._clock()):
                news = [data for data in self._trust.withdrawals() if data not in known]
                for first in range(0, len(news), _WITHDRAWALS):
                    roster = Roster(withdrawals=tuple(news[first : first + _WITHDRAWALS]))
                    await self._host.publish(TOPIC, HELLO.encode(roster))
            self._review()

    def _review(self) -> None:
        """Judge every connected member anew: certificates expire, roles are withdrawn."""
        now = self._clock()
        for peer, member in list(self._proven.items()):
            try:
                standing = self._trust.check(member.chain, now)
            except Untrusted as no:
                reason = f"{short(peer)} was refused: {no}"
                self._note_refusal(peer, Turned(code=no.code, reason=reason, by_us=True))
                self._drop(peer)
                continue
            if standing.roles != member.standing.roles:
                _log.info("member.changed", peer=peer, roles=ordered_roles(standing.roles))
                self._proven[peer] = replace(member, standing=standing)
                if peer in self._members:
                    self._members[peer] = self._proven[peer]
                    self._note_change()
