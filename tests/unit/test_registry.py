"""What a node remembers of members: from themselves, and from what others say of them."""

from __future__ import annotations

import pytest

from meshnode.membership.identity import Identity
from meshnode.membership.port import Membership
from meshnode.membership.registry import MAX_MEMBERS, MAX_OF_ONE, Registry
from meshnode.state.memory_state import MemoryState
from protocols.membership import ROLES
from protocols.membership.messages import Chain, Roster
from tests.unit.membership_actors import NOW_MS, World, key_of, peer_of_key

W = World()
BOB, ANN = peer_of_key("bob"), peer_of_key("ann")
BY_ANN = (*W.chain("ann"), W.certificate("bob", by="ann", issued_ms=NOW_MS))


@pytest.fixture
def registry() -> Registry:
    """Of a node that the founder has let in, and that has met nobody."""
    us = Membership(network_record=W.network_record, secret=W.secret, chain=W.chain("us"))
    return Registry(Identity(bytes(key_of("us"))), us, MemoryState(), lambda: NOW_MS + 10_000)


def hear(registry: Registry, *chains: tuple[bytes, ...]) -> None:
    """From another member."""
    for start in range(0, len(chains), 40):
        part = chains[start : start + 40]
        registry.learn(Roster(members=tuple(Chain(certificates=chain) for chain in part)))


def test_an_inviter_takes_no_rights_from_those_who_never_asked_it(registry: Registry) -> None:
    """Not from a founder's device, and not from a member that another one has let in, however new its word."""
    eve = W.chain("eve")
    hear(registry, W.chain("ann"), BY_ANN, eve)
    lesser = [
        (*eve, W.certificate(who, by="eve", roles=("ask",), issued_ms=NOW_MS + 5000, serial=99))
        for who in ("ann", "bob")
    ]
    hear(registry, *lesser)
    assert registry.is_founder(ANN)
    assert registry.roles_of(ANN) == registry.roles_of(BOB) == set(ROLES)
    registry.keep(BOB, BY_ANN, proven=True)
    hear(registry, *lesser)
    assert registry.roles_of(BOB) == set(ROLES)


def test_who_shows_another_certificate_itself_has_chosen_it(registry: Registry) -> None:
    hear(registry, W.chain("ann"), BY_ANN, W.chain("eve"))
    chosen = (*W.chain("eve"), W.certificate("bob", by="eve", roles=("serve",)))
    assert registry.keep(BOB, chosen, proven=True)
    assert registry.roles_of(BOB) == {"ask", "serve"}


def test_what_is_nearer_newer_or_all_there_is_counts(registry: Registry) -> None:
    by_eve = (*W.chain("eve"), W.certificate("bob", by="eve", roles=("ask",)))
    hear(registry, by_eve)
    assert registry.roles_of(BOB) == {"ask"}, "nothing else is known"
    renewed = (*W.chain("eve"), W.certificate("bob", by="eve", roles=("serve",), issued_ms=NOW_MS + 1))
    hear(registry, renewed, by_eve)
    assert registry.roles_of(BOB) == {"ask", "serve"}, "the same hand has said more since"
    hear(registry, W.chain("bob"), renewed)
    assert registry.is_founder(BOB), "the founder's own word is nearer"
    registry.learn(Roster(withdrawals=(W.withdrawal("bob", by="founder", issued_ms=NOW_MS + 10),)))
    again = (*W.chain("eve"), W.certificate("bob", by="eve", roles=("ask",), issued_ms=NOW_MS + 20))
    hear(registry, again)
    assert registry.roles_of(BOB) == {"ask"}, "what was known did not hold any more"


def test_one_inviter_does_not_fill_the_memory(registry: Registry) -> None:
    eve = W.chain("eve")
    hear(registry, eve, *((*eve, W.certificate(f"made up {n}", by="eve")) for n in range(MAX_OF_ONE + 50)))
    hear(registry, W.chain("ann"), BY_ANN)
    assert registry.roles_of(BOB) == set(ROLES)
    assert len(registry.roll()) <= MAX_OF_ONE + 4
    late = (*eve, W.certificate("late", by="eve"))
    assert registry.keep(peer_of_key("late"), late, proven=True), "who comes itself is remembered"


def test_a_full_memory_has_room_for_who_comes_itself(registry: Registry) -> None:
    names = [f"member {n}" for n in range(MAX_MEMBERS)]
    hear(registry, *(W.chain(name) for name in names))
    assert not registry.keep(ANN, W.chain("ann"), proven=True), "all of them are members"
    registry.learn(Roster(withdrawals=(W.withdrawal(names[0], by="founder"),)))
    assert registry.keep(ANN, W.chain("ann"), proven=True)
    assert registry.is_founder(ANN)


def test_it_is_the_same_after_a_restart() -> None:
    state = MemoryState()
    us = Membership(network_record=W.network_record, secret=W.secret, chain=W.chain("us"))
    for _ in range(2):
        registry = Registry(Identity(bytes(key_of("us"))), us, state, lambda: NOW_MS + 10_000)
        hear(registry, BY_ANN, (*W.chain("eve"), W.certificate("bob", by="eve", roles=("ask",), serial=9)))
        assert registry.roles_of(BOB) == set(ROLES)


def test_devices_of_one_inviter_are_one_branch(registry: Registry) -> None:
    """Those whom a founder's device has let in answer for themselves, and for all whom they let in."""
    dora = peer_of_key("dora")
    hear(registry, W.chain("ann"), BY_ANN, (*BY_ANN, W.certificate("dora", by="bob")))
    assert registry.branch_of(ANN) == ANN
    assert registry.branch_of(BOB) == BOB
    assert registry.branch_of(dora) == BOB
    assert registry.branch_of(peer_of_key("nobody")) == peer_of_key("nobody")
    assert registry.branch_of(registry.us) == registry.us
