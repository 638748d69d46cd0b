"""Making a network, inviting, taking back: on files, without a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshnode.core.errors import ConfigError, IdentityError
from meshnode.core.paths import Paths
from meshnode.membership.enrolment import (
    create_invite,
    describe_ticket,
    init_network,
    open_ticket,
    own_standing,
    restored_trust,
    withdraw_member,
)
from meshnode.membership.identity import Identity
from meshnode.membership.network import (
    founder_path,
    has_network,
    load_founder,
    load_network,
    network_path,
    save_network,
)
from meshnode.membership.port import Membership
from meshnode.state.database import Database
from protocols.codec import encode
from protocols.membership import ROLES, Untrusted
from protocols.membership.messages import MEMBER, Certificate, Chain
from protocols.membership.trust import sign_certificate
from tests.unit.membership_actors import NOW_MS, key_of, peer_of_key


def clock() -> int:
    return NOW_MS


def address(folder: Path) -> str:
    return f"/ip4/127.0.0.1/tcp/4331/p2p/{Identity.load(folder).peer_id}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    init_network(tmp_path / "home", "home", node_name="attic", clock=clock)
    return tmp_path / "home"


def state_of(folder: Path) -> Database:
    return Database(Paths(folder).state)


def ticket_of(folder: Path, **wanted: Any) -> str:
    with state_of(folder) as state:
        return create_invite(load_network(folder), state, clock=clock, **wanted)


def withdraw(folder: Path, peer: str, **how: Any) -> None:
    with state_of(folder) as state:
        withdraw_member(folder, state, peer, clock=clock, **how)


def as_member(home: Path, folder: Path, name: str, roles: tuple[str, ...]) -> Membership:
    """Put the membership of `name`, vouched for by the first node, into another folder."""
    first = load_network(home)
    certificate = Certificate(network=first.network_id, peer=peer_of_key(name), roles=roles, issued_ms=NOW_MS)
    chain = (*first.chain, sign_certificate(Identity.load(home).signing_key, certificate))
    member = Membership(network_record=first.network_record, secret=first.secret, chain=chain, name=name)
    save_network(folder, member)
    return member


def test_init_makes_key_network_and_a_certificate_with_every_role(home: Path) -> None:
    membership, identity = load_network(home), Identity.load(home)
    standing = own_standing(membership, membership.trust(), NOW_MS, identity.peer_id)
    assert (standing.roles, standing.distance, membership.name) == (set(ROLES), 1, "attic")
    assert (membership.network.name, len(membership.secret)) == ("home", 32)
    for path in (Paths(home).key, network_path(home), founder_path(home)):
        assert path.stat().st_mode & 0o777 == 0o600
    founder = load_founder(home)
    assert founder is not None and bytes(founder.verify_key) == membership.network.founders[0]


def test_init_keeps_a_key_that_is_there(tmp_path: Path) -> None:
    identity = Identity.create(tmp_path)
    init_network(tmp_path, "home", clock=clock)
    assert Identity.load(tmp_path).peer_id == identity.peer_id


def test_a_second_init_is_refused_and_changes_nothing(home: Path) -> None:
    before = network_path(home).read_bytes()
    with pytest.raises(IdentityError, match="'home' already"):
        init_network(home, "other")
    assert network_path(home).read_bytes() == before


@pytest.mark.parametrize("name", ["", "   ", "x" * 65, "a\nb"])
def test_a_name_that_can_not_be_shown(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        init_network(tmp_path, name)
    assert not has_network(tmp_path)


def test_a_passphrase_covers_the_founder_too(tmp_path: Path) -> None:
    init_network(tmp_path, "home", passphrase="open", clock=clock)
    with pytest.raises(IdentityError):
        load_founder(tmp_path)
    assert load_founder(tmp_path, "open") is not None
    assert Identity.load(tmp_path, "open").peer_id


def test_an_invite_is_in_the_ledger_and_its_secret_only_in_the_ticket(home: Path) -> None:
    text = ticket_of(home, roles=("publish", "serve"), uses=3, ttl_s=60, addresses=[address(home)])
    ticket = open_ticket(text)
    assert (ticket.roles, ticket.uses, ticket.expires_ms) == (("serve", "publish"), 3, NOW_MS + 60_000)
    assert ticket.issuer == Identity.load(home).peer_id
    assert ticket.network == load_network(home).network_id
    with state_of(home) as database:
        (invite,) = database.invites()
    assert (invite.id, invite.roles, invite.uses) == (ticket.invite, ("serve", "publish"), 3)
    assert all(ticket.secret not in file.read_bytes() for file in home.glob("state.sqlite*"))
    assert "3 devices" in describe_ticket(text, clock=clock)


def test_a_plain_ticket_gives_no_word_in_what_is_learned(home: Path) -> None:
    assert open_ticket(ticket_of(home, addresses=[address(home)])).roles == ("serve",)
    text = ticket_of(home, roles=("vote", "serve", "train"), addresses=[address(home)])
    assert open_ticket(text).roles == ("serve", "train", "vote")
    assert "Roles: serve, train, vote." in describe_ticket(text, clock=clock)


@pytest.mark.parametrize(
    "wrong",
    [{"uses": -1}, {"ttl_s": -1.0}, {"roles": ("king",)}, {"addresses": []}, {"addresses": ["/ip4/127.0.0.1/tcp/1"]}],
)
def test_an_invite_that_makes_no_sense(home: Path, wrong: dict[str, object]) -> None:
    arguments = {"addresses": [address(home)], **wrong}
    with pytest.raises(ConfigError):
        ticket_of(home, **arguments)
    with state_of(home) as database:
        assert database.invites() == ()


def test_who_may_not_invite(home: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="belongs to no network"):
        ticket_of(tmp_path / "nobody", addresses=["/x"])
    as_member(home, tmp_path / "bob", "bob", ("serve",))
    with pytest.raises(IdentityError, match="lacks the role invite"):
        ticket_of(tmp_path / "bob", addresses=["/x"])
    as_member(home, tmp_path / "cleo", "cleo", ("serve", "invite"))
    with pytest.raises(IdentityError, match="'publish'"):
        ticket_of(tmp_path / "cleo", roles=("serve", "publish"), addresses=["/x"])
    for role in ("train", "vote"):
        with pytest.raises(IdentityError, match=f"'{role}'"):
            ticket_of(tmp_path / "cleo", roles=("serve", role), addresses=["/x"])


def test_the_last_of_a_chain_can_not_invite_further(home: Path, tmp_path: Path) -> None:
    member = as_member(home, tmp_path / "bob", "bob", ROLES)
    certificate = Certificate(network=member.network_id, peer=peer_of_key("cleo"), roles=ROLES, issued_ms=NOW_MS)
    chain = (*member.chain, sign_certificate(key_of("bob"), certificate))
    save_network(
        tmp_path / "cleo", Membership(network_record=member.network_record, secret=member.secret, chain=chain)
    )
    with pytest.raises(IdentityError, match="nearer to the founder"):
        ticket_of(tmp_path / "cleo", addresses=["/x"])


def test_withdrawing_is_kept_and_judged(home: Path, tmp_path: Path) -> None:
    member = as_member(home, tmp_path / "bob", "bob", ("serve",))
    withdraw(home, peer_of_key("bob"), reason="sold")
    with state_of(home) as database:
        trust = restored_trust(load_network(home), database, NOW_MS)
    with pytest.raises(Untrusted, match="sold"):
        trust.check(member.chain, NOW_MS)


def test_without_the_founder_key_only_those_further_away_can_be_withdrawn(home: Path, tmp_path: Path) -> None:
    founder_path(home).unlink()
    identity = Identity.load(home)
    with state_of(home) as database:
        database.put_record(MEMBER, identity.peer_id, encode(Chain(certificates=load_network(home).chain)))
    with pytest.raises(IdentityError, match="founder's key"):
        withdraw(home, identity.peer_id)
    member = as_member(home, tmp_path / "bob", "bob", ("serve", "publish"))
    withdraw(home, peer_of_key("bob"), keeps=("serve",))
    with state_of(home) as database:
        trust = restored_trust(load_network(home), database, NOW_MS)
        assert trust.check(member.chain, NOW_MS).roles == {"ask", "serve"}


def test_withdrawing_nonsense(home: Path) -> None:
    for peer, keeps in (("12D3nobody", ()), (peer_of_key("bob"), ("king",))):
        with pytest.raises(ConfigError):
            withdraw(home, peer, keeps=keeps)


def test_a_damaged_or_open_membership_file(home: Path) -> None:
    path = network_path(home)
    good = path.read_bytes()
    for bad in (b"", good[:-1], good[:50] + bytes([good[50] ^ 1]) + good[51:]):
        path.write_bytes(bad)
        with pytest.raises(IdentityError, match="damaged"):
            load_network(home)
    path.write_bytes(good)
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_network(home)


def test_a_certificate_of_another_key(home: Path) -> None:
    membership = load_network(home)
    with pytest.raises(IdentityError, match="the node key of"):
        own_standing(membership, membership.trust(), NOW_MS, peer_of_key("bob"))


def test_secrets_are_in_no_text(home: Path) -> None:
    membership = load_network(home)
    assert repr(membership.secret) not in repr(membership)
    assert membership.secret.hex() not in repr(membership)


def test_what_is_no_ticket_is_one_sentence() -> None:
    with pytest.raises(IdentityError, match="starts with 'meshnode1'"):
        describe_ticket("hello")
