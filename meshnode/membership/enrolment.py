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
from meshnode.membership.keyfile import SEED_BYTES, Passphrase, load_key
from meshnode.membership.network import has_network, load_founder, load_network, save_founder, save_network
from meshnode.membership.place import not_a_member
from meshnode.membership.port import Invite, Membership
from meshnode.membership.rights import demand
from meshnode.membership.secrets import keep_secrets, known_secrets
from meshnode.membership.withdrawals import keep_withdrawal, restore_withdrawals, successions
from meshnode.state.port import Records, State
from protocols.codec import decode
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, peer_id_of, public_key_of, short
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
    INVITE,
    INVITE_BYTES,
    INVITE_SECRET_BYTES,
    MAX_CHAIN,
    MEMBER,
    NONCE_BYTES,
    SECRET_BYTES,
    SERVE,
    Certificate,
    Chain,
    Withdrawal,
)
from protocols.membership.renewal import sign_renewal
from protocols.membership.succession import by_old_key
from protocols.membership.trust import implied, ordered_roles, sign_certificate, sign_withdrawal

DEFAULT_ROLES: Final = (SERVE,)  # of a ticket
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

    Raises IdentityError (may not invite, too far from the founders), ConfigError (a value), DiskError.
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
    if INVITE not in standing.roles:
        raise IdentityError(
            "this node may not invite: its certificate lacks the role invite. Make the ticket on a node that has it "
            "(`meshnode members` shows which do)."
        )
    if missing := implied(wanted) - standing.roles:
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


def require_role(folder: Path, state: Records, role: str, deed: str, *, clock: Wall = wall_ms) -> None:
    """For commands that a running node would refuse later: `deed` is what this node may not do ("publish models").

    Raises IdentityError (no member of any network), Declined `forbidden` (see `rights.demand`).
    """
    now = clock()
    membership = load_network(folder)
    demand(own_standing(membership, restored_trust(membership, state, now), now).roles, role, deed)


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
    state: State,
    peer: str,
    *,
    keeps: Iterable[str] = (),
    reason: str = "",
    passphrase: Passphrase = None,
    founder_key: Path | None = None,
    clock: Wall = wall_ms,
) -> None:
    """Take roles from a member, or (nothing kept) put it out: a signed record, kept in this node's state.

    Signed by the founder's key where this folder has it or `founder_key` names its file, else by the node key. A
    running node takes it up within `services.membership.REVIEW_S` and passes it on. Tickets that the member has used
    let nobody in any more.

    Raises IdentityError (may not do it, the peer is nearer to the founder than we are), ConfigError, DiskError.
    """
    membership = load_network(folder)
    now = clock()
    try:
        public_key_of(peer)
        kept = ordered_roles(keeps)
    except (RemoteProtocolError, LocalProtocolError) as error:
        raise ConfigError(str(error)) from error
    founder = founder_of(folder, membership, state, founder_key, passphrase)
    trust = restored_trust(membership, state, now)
    if founder is None:
        _check_authority(own_standing(membership, trust, now), trust, PeerId(peer), state, now)
    key, chain = founder or (Identity.load(folder, passphrase).signing_key, membership.chain)
    for subject in (peer, *trust.predecessors(peer)):  # its older keys, for those who don't know of its new one
        word = Withdrawal(network=trust.id, peer=subject, keeps=kept, issued_ms=now, reason=reason[:200], chain=chain)
        record = sign_withdrawal(key, word)
        trust.withdraw(record, now)
        keep_withdrawal(state, record)
    for ousted, at_ms in trust.ousted().items():
        state.revoke_redeemed(ousted, at_ms)


def renew_secret(
    folder: Path,
    state: State,
    *,
    passphrase: Passphrase = None,
    founder_key: Path | None = None,
    clock: Wall = wall_ms,
    random_bytes: RandomBytes = secrets.token_bytes,
) -> None:
    """Give the network a new secret, kept in this node's state. A running node hands it to the members.

    Signed by the founder's key where this folder has it or `founder_key` names its file, else by the node key.

    Raises IdentityError (no founder's device, or it may not invite), DiskError.
    """
    membership = load_network(folder)
    now = clock()
    founder = founder_of(folder, membership, state, founder_key, passphrase)
    if founder is None:
        standing = own_standing(membership, restored_trust(membership, state, now), now)
        if not standing.is_founder or INVITE not in standing.roles:
            raise IdentityError(
                "only a founder's device that may invite, or whoever has the founder's key, can renew the secret of "
                "this network. Do it on the device that made the network, or give --founder-key FILE."
            )
    known = known_secrets(membership, state, now)
    issued_ms = max(now, known.present.issued_ms + 1)  # a clock that was ahead must not undo it
    key, chain = founder or (Identity.load(folder, passphrase).signing_key, membership.chain)
    new = sign_renewal(key, membership.network_id, random_bytes(SECRET_BYTES), issued_ms, chain)
    keep_secrets(state, known.plus(new))


def founder_of(
    folder: Path, membership: Membership, state: Records, file: Path | None, passphrase: Passphrase
) -> tuple[SigningKey, tuple[bytes, ...]] | None:
    """The founder's key of the network, if it is here, and the successions that lead to it.

    Raises IdentityError when `file`, or what lies in the data folder, is not the present key of a founder.
    """
    if file is None:
        key = load_founder(folder, passphrase)
    else:
        key = SigningKey(load_key(file, what="the founder's key of the network", passphrase=passphrase))
    if key is None:
        return None
    trust, peer = membership.trust(), peer_id_of(bytes(key.verify_key))
    records = {**by_old_key(membership.chain), **successions(state)}
    trust.succeed(records.values())
    path = trust.founder_path(peer, records)
    where = file or "the founder's key in the data folder"
    if peer in records:
        raise IdentityError(f"{where} was replaced by a newer one (meshnode members new-founder-key); use that")
    if not path and bytes(key.verify_key) not in membership.network.founders:
        raise IdentityError(f"{where} is no founder's key of the network {membership.network.name!r}")
    return key, path


def _check_authority(ours: Standing, trust: Trust, peer: PeerId, state: Records, now_ms: int) -> None:
    if INVITE not in ours.roles:
        raise IdentityError("this node may not withdraw memberships: its certificate lacks the role invite")
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
        raise not_a_member(error) from error
    if peer is not None and standing.peer != peer:
        raise IdentityError(
            f"the certificate in this data folder is of {short(standing.peer)}, the node key of {short(peer)}. "
            "Restore the key that belongs to it, or join again with a new ticket."
        )
    return standing
