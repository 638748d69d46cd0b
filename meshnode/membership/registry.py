"""Who is who: the certificates and withdrawals that a node knows, and the tickets that it redeems.

No connection and no task: everything here is a short call, kept in the state file.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, IdentityError
from meshnode.core.log import get_logger
from meshnode.membership.place import not_a_member
from meshnode.membership.port import Membership, Signer
from meshnode.membership.roll import Entry, note_seen, roll
from meshnode.membership.secrets import keep_secrets, known_secrets
from meshnode.membership.withdrawals import keep_successions, keep_withdrawal, restore_withdrawals
from meshnode.state.port import State
from protocols.codec import decode, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership import Standing, Untrusted
from protocols.membership.messages import (
    FORBIDDEN,
    INVITE,
    MAX_CHAIN,
    MAX_MESSAGE_BYTES,
    MEMBER,
    Certificate,
    Chain,
    Granted,
    Join,
    NewSecret,
    Roster,
    Withdrawal,
)
from protocols.membership.renewal import open_renewal
from protocols.membership.sealing import NONCE_BYTES, seal_secret
from protocols.membership.succession import earlier
from protocols.membership.trust import ordered_roles, sign_certificate, sign_withdrawal

MAX_MEMBERS: Final = 1024  # remembered certificates
FIRST_INVITED: Final = 2  # certificates from the founder to those whom its own devices let in
MAX_OF_ONE: Final = 256  # that one inviter is said to have let in, and that were not met
_CHAINS: Final = 48  # in one Roster
_WITHDRAWALS: Final = 16  # in one Roster
_ROOM: Final = MAX_MESSAGE_BYTES - 1024  # of one Roster for what it lists
_AROUND: Final = 64  # bytes that list and length of one item take
_MESSAGES: Final = 20  # of withdrawals in one hello; with those of all members they are fewer than MAX_ROSTERS

T = TypeVar("T")

_log = get_logger("membership")


class Registry:
    """Our own standing and everybody else's."""

    def __init__(
        self,
        identity: Signer,
        membership: Membership,
        state: State,
        clock: Wall,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Raises IdentityError when our own certificate does not hold, or is of another key."""
        self.us = identity.peer_id
        self.membership = membership
        self.trust = membership.trust()
        self._key = identity.signing_key
        self._state = state
        self._clock = clock
        self.random_bytes = random_bytes
        self._chains: dict[PeerId, tuple[bytes, ...]] = {}
        self._let_in: Counter[PeerId | None] = Counter()  # of those remembered, by who vouches for them
        self._verdicts: dict[PeerId, tuple[tuple[bytes, ...], Standing]] = {}
        restore_withdrawals(self.trust, state, clock())
        self.secrets = known_secrets(membership, state, clock())
        self._withdrawn()
        for peer, data in state.records(MEMBER).items():
            with suppress(RemoteProtocolError):  # of another version; a hello brings it again
                chain = self._chains[PeerId(peer)] = decode(Chain, data).certificates
                self._let_in[self.trust.inviter_of(chain)] += 1
        standing = self._own()
        keep_successions(self.trust, state, membership.chain)
        if standing.peer != self.us:
            raise IdentityError(
                f"the certificate of this node is of {short(standing.peer)}, its key of {short(self.us)}; restore "
                "the key that belongs to the certificate, or join again with a new ticket"
            )

    @property
    def standing(self) -> Standing:
        """Our own roles and certificate. Raises Untrusted when they were withdrawn or have expired."""
        return self.trust.check(self.membership.chain, self._clock())

    def _own(self) -> Standing:
        try:
            return self.standing
        except Untrusted as error:
            raise not_a_member(error) from error

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """Roles of a peer whose certificate is known and holds now; empty for everybody else."""
        standing = self._standing_of(peer)
        return frozenset() if standing is None else standing.roles

    def is_founder(self, peer: PeerId) -> bool:
        """Whether a founder's key itself vouches for a peer, by a certificate that is known and holds now."""
        standing = self._standing_of(peer)
        return standing is not None and standing.is_founder

    def was_put_out(self, peer: PeerId) -> bool:
        """Whether the membership of a peer was withdrawn, and it has no newer one."""
        return self.trust.was_put_out(peer) and self._standing_of(peer) is None

    def branch_of(self, peer: PeerId) -> PeerId:
        """Who answers for a peer where votes are weighed: an inviter that is no founder's device, or itself."""
        standing = self._standing_of(peer)
        if standing is None or standing.distance <= FIRST_INVITED:
            return peer
        return self.trust.inviter_of(self.membership.chain if peer == self.us else self._chains[peer]) or peer

    def _standing_of(self, peer: PeerId) -> Standing | None:
        """The verdict is kept until a withdrawal comes or a certificate ends: it is asked for with every question."""
        chain = self.membership.chain if peer == self.us else self._chains.get(peer)
        if chain is None:
            return None
        now, known = self._clock(), self._verdicts.get(peer)
        if known is not None and known[0] is chain and not 0 < known[1].expires_ms <= now:
            return known[1]
        try:
            standing = self.trust.check(chain, now)
        except Untrusted:
            return None
        self._verdicts[peer] = (chain, standing)
        return standing

    def keep(self, peer: PeerId, chain: tuple[bytes, ...], *, proven: bool = False) -> bool:
        """Remember a chain that holds; whether it was new.

        proven: the peer itself has shown it. What others pass on of a peer only fills a gap, or takes the place of
        what does not hold, of a chain further from the founder, or of an older one by the same hand: whoever may
        invite could else take rights from everybody, with a certificate that nobody has asked for.
        """
        known = self._chains.get(peer)
        if peer == self.us or known == chain:
            return False
        if known is not None and not proven and not self._is_better(chain, known):
            return False
        inviter = self.trust.inviter_of(chain)
        if known is None and not self._has_room(inviter, proven=proven):
            return False
        if keep_successions(self.trust, self._state, chain):
            for old in self.trust.predecessors(peer):
                self._forget(old)
            self._verdicts.clear()
        if known is not None:
            self._let_in[self.trust.inviter_of(known)] -= 1
        self._let_in[inviter] += 1
        self._chains[peer] = chain
        self._state.put_record(MEMBER, peer, encode(Chain(certificates=chain)))
        return True

    def note_seen(self, peer: PeerId, name: str, seen_ms: int) -> None:
        """A member was connected then, under this name; 0: it was let in, and has not come yet."""
        note_seen(self._state, peer, name, seen_ms)

    def roll(self) -> tuple[Entry, ...]:
        """Everybody whose certificate is known, ourselves first."""
        return roll(self.membership, self._state, self.us, self._clock())

    def _is_better(self, chain: tuple[bytes, ...], known: tuple[bytes, ...]) -> bool:
        """Whether what others say of a peer may take the place of what is known of it."""
        now = self._clock()
        try:
            before = self.trust.check(known, now)
        except Untrusted:
            return True
        after = self.trust.check(chain, now)
        if after.distance != before.distance:
            return after.distance < before.distance
        if self.trust.inviter_of(chain) != self.trust.inviter_of(known):
            return False
        old, new = before.certificate, after.certificate
        return (new.issued_ms, new.serial, len(chain)) > (old.issued_ms, old.serial, len(known))

    def _has_room(self, inviter: PeerId | None, *, proven: bool) -> bool:
        """Whether one more member can be remembered; a single inviter can't fill the memory with what it makes up."""
        if inviter is not None and not proven and self._let_in[inviter] >= MAX_OF_ONE:
            return False
        if len(self._chains) < MAX_MEMBERS:
            return True
        if proven and (gone := next((peer for peer in self._chains if self._standing_of(peer) is None), None)):
            self._forget(gone)
            return True
        return False

    def _forget(self, peer: PeerId) -> None:
        chain = self._chains.pop(peer, None)
        if chain is not None:
            self._let_in[self.trust.inviter_of(chain)] -= 1

    def rosters(self, first: Collection[PeerId]) -> Iterator[Roster]:
        """What we know, for one hello: who was put out, then the members, these peers first."""
        peers = sorted(self._chains, key=lambda peer: (peer not in first, peer))
        chains = [Chain(certificates=self._chains[peer]) for peer in peers]
        yield from packed(self.trust.withdrawals()[: _MESSAGES * _WITHDRAWALS])
        for part in _parts(chains, _CHAINS, lambda chain: sum(map(len, chain.certificates))):
            yield Roster(members=part)

    def learn(self, roster: Roster) -> tuple[bool, tuple[bytes, ...]]:
        """Take what holds; the rest is ignored, for the sender may not have known.

        Whether a certificate was new, and the withdrawals that were.
        """
        now = self._clock()
        new_member = False
        for chain in roster.members:
            with suppress(Untrusted):
                standing = self.trust.check(chain.certificates, now)
                new_member |= self.keep(standing.peer, chain.certificates)
        news = []
        for data in roster.withdrawals:
            with suppress(Untrusted):
                subject = self.trust.withdraw(data, now)
                if subject is not None:
                    keep_withdrawal(self._state, data)
                    news.append(data)
        if news:
            self._withdrawn()
        return new_member, tuple(news)

    def remembers(self, peer: PeerId, chain: tuple[bytes, ...]) -> bool:
        """Whether we know this very chain of the peer, or of the key that it had before, from before."""
        known = self._chains.values()
        return self._chains.get(peer) == chain or any(old in known for old in earlier(chain))

    def take_secret(self, new: NewSecret) -> bool:
        """Take what a member says is a secret of the network; whether it is the present one from now on.

        Raises Untrusted when it does not hold.
        """
        secret = open_renewal(new.renewal, new.secret, self.trust, self._clock())
        before = self.secrets.present
        if secret.id not in self.secrets.ids:
            self.secrets = self.secrets.plus(secret)
            keep_secrets(self._state, self.secrets)
        return self.secrets.present != before

    def reload_secrets(self) -> bool:
        """Take up a secret that a command has put into the state file; whether there is a new present one."""
        before = self.secrets.present
        self.secrets = known_secrets(self.membership, self._state, self._clock(), self.secrets)
        return self.secrets.present != before

    def reload(self) -> tuple[bytes, ...]:
        """Take up the withdrawals that a command has put into the state file; those that were new."""
        known = set(self.trust.withdrawals())
        if not restore_withdrawals(self.trust, self._state, self._clock()):
            return ()
        self._withdrawn()
        return tuple(data for data in self.trust.withdrawals() if data not in known)

    def _withdrawn(self) -> None:
        """Something was withdrawn. Who was put out does not come in again under another key, with an old ticket."""
        self._verdicts.clear()
        for peer, at_ms in self.trust.ousted().items():
            if self._state.revoke_redeemed(peer, at_ms):
                _log.info("invites.struck", peer=peer)

    def withdrawal(self, peer: PeerId, keeps: Iterable[str], reason: str) -> tuple[bytes, ...]:
        """Our signed word that takes roles from a member, or (nothing kept) puts it out; and from every key that it
        had before, for those who don't know of its new one. Not learned yet.

        Raises IdentityError when this node may not say that.
        """
        ours = self._own()
        if INVITE not in ours.roles:
            raise IdentityError("this node may not withdraw memberships: its certificate lacks the role invite")
        chain = self.membership.chain if peer == self.us else self._chains.get(peer)
        if chain is not None and self._distance(chain) <= ours.distance:
            raise IdentityError(
                f"{short(peer)} is as near to the founder as this node, so this node can't take its rights back. "
                "Do it on the node that holds the founder's key."
            )
        now, kept = self._clock(), ordered_roles(keeps)
        return tuple(
            sign_withdrawal(
                self._key,
                Withdrawal(
                    network=self.trust.id,
                    peer=subject,
                    keeps=kept,
                    issued_ms=now,
                    reason=reason[:200],
                    chain=self.membership.chain,
                ),
            )
            for subject in (peer, *self.trust.predecessors(peer))
        )

    def _distance(self, chain: tuple[bytes, ...]) -> int:
        """Of a chain from the founder; far away when it does not hold."""
        try:
            return self.trust.check(chain, self._clock()).distance
        except Untrusted:
            return MAX_CHAIN + 1

    def grant(self, peer: PeerId, join: Join) -> Granted:
        """Redeem a ticket for the peer that proved its id on the connection.

        Raises Declined `forbidden`, `invite-expired`, `invite-used`.
        """
        now = self._clock()
        try:
            ours = self.standing
        except Untrusted as error:
            raise Declined(FORBIDDEN, f"the node that made the ticket is no member any more: {error}") from error
        if INVITE not in ours.roles or ours.distance >= MAX_CHAIN:
            raise Declined(
                FORBIDDEN,
                "this node lacks the role invite; a ticket is redeemed at the node that made it",
            )
        invite = self._state.redeem(join.invite, join.secret, peer, now, not_before_ms=self.trust.withdrawn_ms(peer))
        certificate = Certificate(
            network=self.trust.id,
            peer=peer,
            roles=ordered_roles(set(invite.roles) & ours.roles),
            issued_ms=now,
            expires_ms=now + invite.member_ms if invite.member_ms else 0,
            serial=self._state.next_serial(),
        )
        chain = (*self.membership.chain, sign_certificate(self._key, certificate))
        self.keep(peer, chain, proven=True)
        self.note_seen(peer, join.name, 0)
        _log.info("member.invited", peer=peer, name=join.name, roles=certificate.roles)
        present = self.secrets.present
        sealed = seal_secret(
            present.secret,
            invite=join.invite,
            invite_secret=join.secret,
            joiner=peer,
            nonce=self.random_bytes(NONCE_BYTES),
        )
        return Granted(
            network=self.membership.network_record, chain=chain, sealed=sealed, wall_ms=now, renewal=present.renewal
        )


def packed(withdrawals: tuple[bytes, ...]) -> Iterator[Roster]:
    """Withdrawals in messages that fit the wire."""
    for part in _parts(withdrawals, _WITHDRAWALS, len):
        yield Roster(withdrawals=part)


def _parts(items: Sequence[T], most: int, size: Callable[[T], int]) -> Iterator[tuple[T, ...]]:
    """Parts of at most so many items that together fit into one message."""
    part: list[T] = []
    room = _ROOM
    for item in items:
        need = size(item) + _AROUND
        if part and (len(part) == most or need > room):
            yield tuple(part)
            part, room = [], _ROOM
        part.append(item)
        room -= need
    if part:
        yield tuple(part)
