"""New keys of a node and of the founder, in data folders; and what a cut in power leaves of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from meshnode.core.errors import IdentityError
from meshnode.core.paths import Paths
from meshnode.membership import rotation
from meshnode.membership.enrolment import init_network, own_standing, renew_secret, restored_trust, withdraw_member
from meshnode.membership.identity import Identity
from meshnode.membership.keyfile import is_protected
from meshnode.membership.network import founder_path, load_founder, load_network, save_network
from meshnode.membership.registry import Registry
from meshnode.membership.rotation import NEXT, new_founder_key, new_node_key
from meshnode.state.database import Database
from protocols.ids import PeerId
from protocols.membership import ROLES
from protocols.membership.messages import Certificate, Roster
from protocols.membership.trust import sign_certificate
from tests.unit.membership_actors import NOW_MS, peer_of_key


class Clock:
    now = NOW_MS

    def __call__(self) -> int:
        self.now += 1000
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def home(tmp_path: Path, clock: Clock) -> Path:
    init_network(tmp_path / "home", "home", clock=clock)
    return tmp_path / "home"


@contextmanager
def registry_of(folder: Path, clock: Clock) -> Iterator[Registry]:
    with Database(Paths(folder).state) as state:
        yield Registry(Identity.load(folder), load_network(folder), state, clock)


def rotate(folder: Path, clock: Clock, **more: str) -> PeerId:
    with Database(Paths(folder).state) as state:
        return new_node_key(folder, state, clock=clock, **more)  # type: ignore[arg-type]


def member(home: Path, folder: Path, name: str, clock: Clock, roles: tuple[str, ...] = ROLES) -> Path:
    """A data folder of somebody whom the node of `home` has let in."""
    Paths(folder).create()
    identity = Identity.create(folder)
    inviter = load_network(home)
    certificate = Certificate(
        network=inviter.network_id, peer=identity.peer_id, roles=roles, issued_ms=clock(), serial=1
    )
    signed = sign_certificate(Identity.load(home).signing_key, certificate)
    save_network(folder, replace(inviter, chain=(*inviter.chain, signed), name=name))
    return folder


def test_a_node_is_another_peer_with_the_same_rights(home: Path, clock: Clock) -> None:
    before, old_chain = Identity.load(home).peer_id, load_network(home).chain
    after = rotate(home, clock)
    assert after == Identity.load(home).peer_id != before
    with registry_of(home, clock) as registry:
        assert registry.standing.peer == after and registry.standing.roles == set(ROLES)
        assert registry.is_founder(after)
        registry.keep(before, old_chain)
        assert not registry.roles_of(before)
    third = rotate(home, clock)
    assert len({before, after, third}) == 3


def test_others_learn_it_from_the_chain_and_forget_the_old_key(home: Path, tmp_path: Path, clock: Clock) -> None:
    guest = member(home, tmp_path / "guest", "guest", clock)
    old, old_chain = Identity.load(home).peer_id, load_network(home).chain
    with registry_of(guest, clock) as registry:
        assert registry.keep(old, old_chain)
    after = rotate(home, clock)
    chain = load_network(home).chain
    with registry_of(guest, clock) as registry:
        assert registry.remembers(after, chain), "it is the one that was known, with another key"
        assert not registry.remembers(after, (*chain[:-1], b"")) and not registry.remembers(after, chain[1:])
        assert registry.keep(after, chain)
        assert registry.roles_of(after) == set(ROLES) and not registry.roles_of(old)
        assert {entry.peer for entry in registry.roll()} == {registry.us, after}
        assert registry.standing.roles == set(ROLES), "whom it has let in stays"
    with registry_of(guest, clock) as registry:  # after a restart
        assert registry.roles_of(after) == set(ROLES) and not registry.roles_of(old)


def test_who_is_put_out_is_out_with_every_key_it_had(home: Path, tmp_path: Path, clock: Clock) -> None:
    guest = member(home, tmp_path / "guest", "guest", clock)
    first, first_chain = Identity.load(guest).peer_id, load_network(guest).chain
    second = rotate(guest, clock)
    second_chain = load_network(guest).chain
    with registry_of(home, clock) as registry:
        registry.keep(second, second_chain)
    with Database(Paths(home).state) as state:
        withdraw_member(home, state, second, clock=clock)
    with registry_of(home, clock) as registry:
        fresh = load_network(home).trust()  # of somebody who has never heard of the new key
        for withdrawal in registry.trust.withdrawals():
            fresh.withdraw(withdrawal, clock())
    for chain in (first_chain, second_chain):
        with pytest.raises(Exception, match="was withdrawn"):
            fresh.check(chain, clock())
    assert first != second


def test_a_passphrase_stays(tmp_path: Path, clock: Clock) -> None:
    home = tmp_path / "home"
    init_network(home, "home", passphrase="open", clock=clock)
    with pytest.raises(IdentityError, match="is wrong"):
        rotate(home, clock, passphrase="shut")
    after = rotate(home, clock, passphrase="open")
    assert is_protected(Paths(home).key)
    assert Identity.load(home, "open").peer_id == after


def test_the_founders_key_is_replaced_and_the_new_one_counts(home: Path, tmp_path: Path, clock: Clock) -> None:
    guest = member(home, tmp_path / "guest", "guest", clock)
    old = load_founder(home)
    assert old is not None
    kept = tmp_path / "old.key"
    kept.write_bytes(founder_path(home).read_bytes())
    kept.chmod(0o600)
    for _ in range(2):
        with Database(Paths(home).state) as state:
            assert new_founder_key(home, state, clock=clock) == founder_path(home)
    new = load_founder(home)
    assert new is not None and bytes(new) != bytes(old)
    with registry_of(home, clock) as registry:
        assert registry.standing.is_founder
        chain = load_network(home).chain
    with registry_of(guest, clock) as registry:
        assert registry.standing.roles, "members stay members"
        assert registry.keep(Identity.load(home).peer_id, chain)
        eve = Certificate(
            network=registry.trust.id, peer=peer_of_key("eve"), roles=ROLES, issued_ms=clock(), serial=1
        )
        with pytest.raises(Exception, match="had been replaced"):
            registry.trust.check((sign_certificate(old, eve),), clock())
    with Database(Paths(home).state) as state:
        withdraw_member(home, state, Identity.load(guest).peer_id, clock=clock)
        renew_secret(home, state, clock=clock)
        with pytest.raises(IdentityError, match="was replaced by a newer one"):
            renew_secret(home, state, founder_key=kept, clock=clock)
        trust = restored_trust(load_network(home), state, clock())
    with registry_of(guest, clock) as registry:
        registry.learn(Roster(withdrawals=trust.withdrawals()))
        assert not registry.roles_of(registry.us)


def test_a_key_of_somebody_else_founds_nothing(home: Path, tmp_path: Path, clock: Clock) -> None:
    other = tmp_path / "other"
    init_network(other, "other", clock=clock)
    with Database(Paths(home).state) as state, pytest.raises(IdentityError, match="is no founder's key"):
        new_founder_key(home, state, file=founder_path(other), clock=clock)
    founder_path(home).unlink()
    with Database(Paths(home).state) as state, pytest.raises(IdentityError, match="--founder-key FILE"):
        new_founder_key(home, state, clock=clock)


@pytest.mark.parametrize("step", ["save_network", "_put_in_place"])
@pytest.mark.parametrize("which", [new_node_key, new_founder_key], ids=["node", "founder"])
def test_a_cut_in_power_leaves_something_that_works_or_can_be_ended(
    home: Path, clock: Clock, step: str, which: object
) -> None:
    assert which in (new_node_key, new_founder_key)
    act = new_node_key if which is new_node_key else new_founder_key
    path = Paths(home).key if which is new_node_key else founder_path(home)
    before = path.read_bytes()
    with (
        Database(Paths(home).state) as state,
        patch.object(rotation, step, side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        act(home, state, clock=clock)
    assert path.read_bytes() == before and path.with_name(path.name + NEXT).exists()
    if step == "save_network":  # nothing has changed yet
        with registry_of(home, clock) as registry:
            assert registry.standing.roles == set(ROLES)
    with Database(Paths(home).state) as state:
        act(home, state, clock=clock)
    assert not path.with_name(path.name + NEXT).exists()
    assert path.read_bytes() != before
    with registry_of(home, clock) as registry:
        assert registry.standing.roles == set(ROLES)
        own_standing(load_network(home), registry.trust, clock(), Identity.load(home).peer_id)


def test_a_key_is_not_replaced_without_end(home: Path, clock: Clock) -> None:
    with pytest.raises(IdentityError, match=r"replaced as often.*new ticket"):
        for _ in range(10):
            rotate(home, clock)
    with registry_of(home, clock) as registry:
        assert registry.standing.roles == set(ROLES), "and the last one works"


def test_a_member_with_the_founders_key_takes_the_place_of_a_lost_device(
    home: Path, tmp_path: Path, clock: Clock
) -> None:
    guest = member(home, tmp_path / "guest", "guest", clock, roles=("serve",))
    drawer = tmp_path / "founder.key"
    founder_path(home).rename(drawer)
    lost, lost_chain = Identity.load(home).peer_id, load_network(home).chain
    with registry_of(guest, clock) as registry:
        registry.keep(lost, lost_chain)
        assert not registry.is_founder(registry.us)
    with Database(Paths(guest).state) as state:
        with pytest.raises(IdentityError, match="lacks the role invite"):
            withdraw_member(guest, state, lost, clock=clock)
        withdraw_member(guest, state, lost, founder_key=drawer, clock=clock)
        with pytest.raises(IdentityError, match="no member of the network any more"):
            own_standing(load_network(guest), restored_trust(load_network(guest), state, clock()), clock())
        new_founder_key(guest, state, file=drawer, clock=clock)
    with registry_of(guest, clock) as registry:
        assert registry.is_founder(registry.us) and registry.standing.roles == set(ROLES)
        assert not registry.roles_of(lost)
    assert load_founder(guest) is None and drawer.exists(), "the key stays where it was kept"
