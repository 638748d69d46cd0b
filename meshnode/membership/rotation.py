"""New keys: of a node, and of the founder. Nothing runs on the data folder meanwhile.

A cut in power leaves either the old key with the old chain, or both new; the new key waits beside the old one until
the chain that needs it is written (`finish`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from nacl.signing import SigningKey

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import DiskError, IdentityError
from meshnode.core.paths import Paths
from meshnode.membership.enrolment import founder_of, own_standing, restored_trust
from meshnode.membership.identity import Identity
from meshnode.membership.keyfile import SEED_BYTES, Passphrase, is_protected, peer_of_key, save_key
from meshnode.membership.network import founder_path, load_network, save_network
from meshnode.membership.withdrawals import keep_successions
from meshnode.state.port import State
from protocols.ids import PeerId, peer_id_of
from protocols.membership import ROLES
from protocols.membership.messages import MAX_LINKS, Certificate
from protocols.membership.succession import heirs, sign_succession
from protocols.membership.trust import sign_certificate

NEXT: Final = ".next"  # added to the name of a key file: the key that takes its place

RandomBytes = Callable[[int], bytes]


def new_node_key(
    folder: Path,
    state: State,
    *,
    passphrase: Passphrase = None,
    clock: Wall = wall_ms,
    random_bytes: RandomBytes = secrets.token_bytes,
) -> PeerId:
    """Give the node of a data folder a new key, which the old one signs; its new peer id.

    Protected by the same passphrase, if the old one is.

    Raises IdentityError (the membership does not hold, or the key was replaced too often), DiskError.
    """
    membership = load_network(folder)
    path = Paths(folder).key
    if (done := finish(path, membership.chain)) is not None:
        return done
    now = clock()
    old = Identity.load(folder, passphrase)
    trust = restored_trust(membership, state, now)
    own_standing(membership, trust, now, old.peer_id)
    if len(membership.chain) >= MAX_LINKS - 2:  # room for a founder's new key, and for a member that it lets in
        raise IdentityError(
            f"the key of this node was replaced as often as its certificate can say ({len(membership.chain)} "
            "records); let the node join again with a new ticket, in a new data folder"
        )
    key = SigningKey(random_bytes(SEED_BYTES))
    record = sign_succession(old.signing_key, key, membership.network_id, now)
    _write(path, bytes(key), passphrase, random_bytes)
    save_network(folder, replace(membership, chain=(*membership.chain, record)))
    _put_in_place(path)
    keep_successions(trust, state, [record])
    return peer_id_of(bytes(key.verify_key))


def new_founder_key(
    folder: Path,
    state: State,
    *,
    file: Path | None = None,
    passphrase: Passphrase = None,
    clock: Wall = wall_ms,
    random_bytes: RandomBytes = secrets.token_bytes,
) -> Path:
    """Put a new founder's key in the place of the old one, which signs it; where it lies.

    This node becomes a founder's device, by a certificate of the new key. Members stay members.

    Args:
      file: where the founder's key lies, if it is not in the data folder.

    Raises IdentityError (the key is not here, or is none of this network's founders), DiskError.
    """
    membership = load_network(folder)
    path = file or founder_path(folder)
    if finish(path, membership.chain) is not None:
        return path
    now = clock()
    found = founder_of(folder, membership, state, file, passphrase)
    if found is None:
        raise IdentityError(
            f"the founder's key is not in {path}. Run this where it is, or name its file with --founder-key FILE."
        )
    old, before = found
    trust = restored_trust(membership, state, now)
    us = peer_of_key(Paths(folder).key)  # whose membership may be over: this gives it a new one
    key = SigningKey(random_bytes(SEED_BYTES))
    record = sign_succession(old, key, membership.network_id, now)
    certificate = Certificate(
        network=membership.network_id, peer=us, roles=ROLES, issued_ms=now + 1, serial=state.next_serial()
    )
    chain = (*before, record, sign_certificate(key, certificate))
    if len(chain) > MAX_LINKS - 3:  # room for those whom it lets in
        raise IdentityError("the founder's key was replaced as often as a network can remember; make a new network")
    _write(path, bytes(key), passphrase, random_bytes)
    save_network(folder, replace(membership, chain=chain))
    _put_in_place(path)
    keep_successions(trust, state, [record])
    return path


def finish(path: Path, chain: tuple[bytes, ...]) -> PeerId | None:
    """End what a cut in power has interrupted: if the chain needs the key that waits, it takes its place.

    Its peer id; None when there was nothing to end. Raises DiskError, IdentityError.
    """
    waiting = path.with_name(path.name + NEXT)
    if not waiting.exists():
        return None
    peer = peer_of_key(waiting)
    if peer in heirs(chain):
        _put_in_place(path)
        return peer
    _remove(waiting)
    return None


def _write(path: Path, seed: bytes, passphrase: Passphrase, random_bytes: RandomBytes) -> None:
    given = None
    if is_protected(path):
        given = passphrase() if callable(passphrase) else passphrase
    save_key(path.with_name(path.name + NEXT), seed, random_bytes=random_bytes, passphrase=given)


def _put_in_place(path: Path) -> None:
    try:
        path.with_name(path.name + NEXT).replace(path)
    except OSError as error:
        raise DiskError(
            f"the new key can't take the place of {path}: {error.strerror or error}. Run the command again."
        ) from error


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise DiskError(f"{path}, a key that was never used, can't be removed: {error.strerror or error}") from error
