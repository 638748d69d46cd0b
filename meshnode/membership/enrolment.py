"""Making a network, inviting devices, taking rights back: what needs no connection."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from nacl.signing import SigningKey

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import ConfigError, IdentityError
from meshnode.membership.identity import Identity
from meshnode.membership.keyfile import SEED_BYTES, Passphrase
from meshnode.membership.network import has_network, load_founder, load_network, save_founder, save_network
from meshnode.membership.port import Invite, Membership
from meshnode.membership.withdrawals import keep_withdrawal, restore_withdrawals
from meshnode.state.port import Records, State
from protocols.codec import decode
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, public_key_of, short
from protocols.membership import (
    ROLES,
    Network,
    Standing,
    Ticket,
    Trust,
    Untrusted,
    describe,
    format_ticket,
    network_id,
    parse_ticket,
    sign_network,
)
from protocols.membership.messages import (
    ADMIN,
    INVITE_BYTES,
    INVITE_SECRET_BYTES,
    MAX_CHAIN,
    MEMBER,
    NONCE_BYTES,
    PUBLISH,
    SECRET_BYTES,
    SERVE,
    TRAIN,
    VOTE,
    Certificate,
    Chain,
    Withdrawal,
)
from protocols.membership.trust import ordered_roles, sign_certificate, sign_withdrawal

DEFAULT_ROLES: Final = (SERVE, TRAIN, PUBLISH, VOTE)  # everything but letting others in
DEFAULT_TTL_S: Final = 24 * 3600.0
MAX_ADDRESSES: Final = 16

RandomBytes = Callable[[int], bytes]


def init_network(
    folder: Path,
    name: str,
    *,
    node_name: str = "",
    passphrase: Passphrase = None,
    clock: Wall = wall_ms,
    random_bytes: RandomBytes = secrets.token_bytes,
) -> Membership:
    """Make a network with this node as its first member, with every role. Makes the node key if it is missing.

    Raises IdentityError (the folder belongs to a network already, the key can't be used), ConfigError (the
    name), DiskError.
    """
    if has_network(folder):
        known = load_network(folder)
        raise IdentityError(
            f"this node belongs to the network {known.network.name!r} already ({known.network_id}). "
            "Choose another data folder with --data to make a second one."
        )
    if not name.strip() or len(name) > 64 or not name.isprintable():
        raise ConfigError(f"{name!r} is no name for a network: it takes 1 to 64 characters that can be shown")
    identity = open_identity(folder, passphrase, random_bytes=random_bytes)
    founder_seed = random_bytes(SEED_BYTES)
    founder = SigningKey(founder_seed)
    now = clock()
    network = Network(
        name=name.strip(), nonce=random_bytes(NONCE_BYTES), founders=(bytes(founder.verify_key),), created_ms=now
    )
    certificate = Certificate(
        network=network_id(network), peer=identity.peer_id, roles=ROLES, issued_ms=now, expires_ms=0, serial=1
    )
    membership = Membership(
        network_record=sign_network(founder, network),
        secret=random_bytes(SECRET_BYTES),
        chain=(sign_certificate(founder, certificate),),
        name=node_name[:64],
    )
    protection = passphrase() if callable(passphrase) else passphrase
    save_founder(folder, founder_seed, random_bytes=random_bytes, passphrase=protection or None)
    save_network(folder, membership)
    return membership


def open_identity(
    folder: Path, passphrase: Passphrase = None, *, random_bytes: RandomBytes = secrets.token_bytes
) -> Identity:
    """The node key of a data folder, made if it is missing. Raises IdentityError, DiskError."""
    if Identity.exists(folder):
        return Identity.load(folder, passphrase)
    given = passphrase() if callable(passphrase) else passphrase
    return Identity.create(folder, passphrase=given, random_bytes=random_bytes)


def create_invite(
    membership: Membership,
    state: State,
    *,
    roles: Iterable[str] = DEFAULT_ROLES,
    uses: int = 1,
    ttl_s: float = DEFAULT_TTL_S,
    addresses: Sequence[str],
    member_ttl_s: float = 0.0,
    clock: Wall = wall_ms,
    random_bytes: RandomBytes = secrets.token_bytes,
) -> str:
    """Write an invite into the ledger of this node; the text of the ticket that redeems it.

    Args:
      state: holds the ledger, and what was withdrawn.
      roles: what the new members may do; only roles that this node has itself.
      uses: how many devices; 0 is any number.
      ttl_s: seconds until the ticket expires; 0 is never.
      addresses: multiaddrs with /p2p/<peer id> where this node listens; bootstrap peers after them.
      member_ttl_s: seconds until the certificates expire that it gives; 0 is never.

    Raises IdentityError (not an admin, too far from the founders), ConfigError (a value), DiskError.
    """
    now = clock()
    if not 0 <= uses <= 1_000_000 or ttl_s < 0 or member_ttl_s < 0:
        raise ConfigError(f"a ticket for {uses} devices and {ttl_s:.0f} s: both are 0 (no limit) or more")
    if not addresses:
        raise ConfigError(
            "a ticket needs at least one address where this node can be reached; start the node first, or set "
            "network.listen"
        )
    standing = own_standing(membership, restored_trust(membership, state, now), now)
    try:
        wanted = ordered_roles(roles)
    except LocalProtocolError as error:
        raise ConfigError(str(error)) from error
    if ADMIN not in standing.roles:
        raise IdentityError(
            "this node may not invite: its certificate lacks the role admin. Make the ticket on an admin's node."
        )
    if missing := set(wanted) - standing.roles:
        raise IdentityError(f"this node can't give the role {min(missing)!r}: it does not have it itself")
    if standing.distance >= MAX_CHAIN:
        raise IdentityError(
            f"this node was invited at {standing.distance} removes from the founder and can't invite further "
            f"({MAX_CHAIN} is the limit). Make the ticket on a node nearer to the founder."
        )
    secret = random_bytes(INVITE_SECRET_BYTES)
    invite = Invite(
        id=random_bytes(INVITE_BYTES),
        secret_hash=hashlib.sha256(secret).digest(),
        roles=wanted,
        uses=uses,
        created_ms=now,
        expires_ms=now + round(ttl_s * 1000) if ttl_s else 0,
        member_ms=round(member_ttl_s * 1000),
    )
    network = membership.network
    ticket = Ticket(
        network=membership.network_id,
        name=network.name,
        founders=network.founders,
        issuer=standing.peer,
        addresses=tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES],
        invite=invite.id,
        secret=secret,
        roles=wanted,
        uses=uses,
        expires_ms=invite.expires_ms,
    )
    text = format_ticket(ticket)
    try:
        parse_ticket(text)
    except RemoteProtocolError as error:
        raise ConfigError(f"no ticket can be made: {error}") from error
    state.add_invite(invite)
    return text


def own_peer(folder: Path, *, clock: Wall = wall_ms) -> PeerId:
    """The peer id of a data folder's node, read from its certificate (no key needed). Raises IdentityError."""
    membership = load_network(folder)
    return own_standing(membership, membership.trust(), clock()).peer


def open_ticket(text: str) -> Ticket:
    """Read a ticket. Raises IdentityError with the sentence to show."""
    try:
        return parse_ticket(text)
    except RemoteProtocolError as error:
        raise IdentityError(str(error)) from error


def describe_ticket(text: str, *, clock: Wall = wall_ms) -> str:
    """A ticket in words, without its secret. Raises IdentityError."""
    return describe(open_ticket(text), clock())


def withdraw_member(
    folder: Path,
    state: Records,
    peer: str,
    *,
    keeps: Iterable[str] = (),
    reason: str = "",
    passphrase: Passphrase = None,
    clock: Wall = wall_ms,
) -> bytes:
    """Take roles from a member, or (nothing kept) put it out. The signed record, kept in this node's state.

    Signed by the founder's key where this folder has it, else by the node key. A running node takes it up
    within `services.membership.REVIEW_S` and passes it on.

    Raises IdentityError (not an admin, the peer is nearer to the founder than we are), ConfigError, DiskError.
    """
    membership = load_network(folder)
    now = clock()
    try:
        public_key_of(peer)
        kept = ordered_roles(keeps)
    except (RemoteProtocolError, LocalProtocolError) as error:
        raise ConfigError(str(error)) from error
    founder = load_founder(folder, passphrase)
    key = founder or Identity.load(folder, passphrase).signing_key
    trust = restored_trust(membership, state, now)
    if founder is None:
        _check_authority(own_standing(membership, trust, now), trust, PeerId(peer), state, now)
    record = sign_withdrawal(
        key,
        Withdrawal(
            network=trust.id,
            peer=peer,
            keeps=kept,
            issued_ms=now,
            reason=reason[:200],
            chain=() if founder else membership.chain,
        ),
    )
    trust.withdraw(record, now)
    keep_withdrawal(state, record)
    return record


def _check_authority(ours: Standing, trust: Trust, peer: PeerId, state: Records, now_ms: int) -> None:
    if ADMIN not in ours.roles:
        raise IdentityError("this node may not withdraw memberships: its certificate lacks the role admin")
    data = state.record(MEMBER, peer)
    if data is None:
        return
    try:
        theirs = trust.check(decode(Chain, data).certificates, now_ms)
    except RemoteProtocolError:
        return  # no member at the moment; the withdrawal then holds for what it may show later
    if theirs.distance <= ours.distance:
        raise IdentityError(
            f"{short(peer)} is as near to the founder as this node, so this node can't take its rights back. "
            "Do it on the node that holds the founder's key."
        )


def restored_trust(membership: Membership, state: Records, now_ms: int) -> Trust:
    """The judge of chains, with every withdrawal that this node has kept."""
    trust = membership.trust()
    restore_withdrawals(trust, state, now_ms)
    return trust


def own_standing(membership: Membership, trust: Trust, now_ms: int, peer: PeerId | None = None) -> Standing:
    """What our own certificate gives. Raises IdentityError when it does not hold, or is not of `peer`."""
    try:
        standing = trust.check(membership.chain, now_ms)
    except Untrusted as error:
        raise IdentityError(f"the membership of this node does not hold: {error}") from error
    if peer is not None and standing.peer != peer:
        raise IdentityError(
            f"the certificate in this data folder is of {short(standing.peer)}, the node key of {short(peer)}. "
            "Restore the key that belongs to it, or join again with a new ticket."
        )
    return standing
