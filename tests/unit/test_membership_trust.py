"""Chains, roles, expiry, withdrawals."""

from __future__ import annotations

import pytest

from protocols.codec import encode
from protocols.envelope import sign_record
from protocols.membership import ROLES, Trust, Untrusted
from protocols.membership.messages import MAX_CERTIFICATE_BYTES, MAX_CLOCK_MS, Certificate
from tests.unit.membership_actors import NOW_MS, World, key_of, peer_of_key

W = World()
LATER = NOW_MS + 60_000


def refused(trust: Trust, chain: tuple[bytes, ...], wall_ms: int = NOW_MS) -> Untrusted:
    with pytest.raises(Untrusted) as caught:
        trust.check(chain, wall_ms)
    return caught.value


def test_a_chain_gives_peer_roles_and_distance() -> None:
    standing = W.trust().check(W.chain("ann", "bob", "cleo", roles=("serve", "publish")), NOW_MS)
    assert (standing.peer, standing.distance) == (peer_of_key("cleo"), 3)
    assert standing.roles == {"ask", "serve", "publish"}  # who serves may ask


def test_the_earliest_expiry_of_a_chain_counts() -> None:
    ann = W.certificate("ann", by="founder", expires_ms=NOW_MS + 500)
    bob = W.certificate("bob", by="ann", expires_ms=NOW_MS + 900)
    assert W.trust().check((ann, bob), NOW_MS).expires_ms == NOW_MS + 500
    assert refused(W.trust(), (ann, bob), NOW_MS + 500).code == "expired"


FIRST = W.certificate("ann", by="founder", roles=("serve",))
SECOND = W.certificate("ann", by="founder", roles=("serve", "invite"))
EVE = Certificate(network=W.trust().id, peer=peer_of_key("eve"), roles=("invite",), issued_ms=NOW_MS)
REFUSED: dict[str, tuple[tuple[bytes, ...], str, str]] = {
    "nothing": ((), "stranger", ""),
    "too many certificates": (W.chain("a", "b", "c", "d"), "stranger", ""),
    "another founder": (World(founder="mallory").chain("ann"), "other-network", ""),
    "its own word": ((W.certificate("eve", by="eve"),), "stranger", "signed by nobody this network trusts"),
    "a gap": ((W.chain("ann")[0], W.certificate("cleo", by="bob")), "stranger", ""),
    "no inviter vouches": (
        (FIRST, W.certificate("bob", by="ann", roles=("serve",))),
        "forbidden",
        "may not invite",
    ),
    "a role that the giver lacks": (
        (SECOND, W.certificate("bob", by="ann", roles=("serve", "publish"))),
        "forbidden",
        "'publish'",
    ),
    "the future": ((W.certificate("ann", by="founder", issued_ms=NOW_MS + MAX_CLOCK_MS + 1),), "clock", ""),
    "padding, before it is parsed": ((bytes(MAX_CERTIFICATE_BYTES + 1),), "stranger", ""),
    "a record of another kind": ((sign_record(key_of("founder"), "advert", encode(EVE)),), "stranger", ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_chain_that_does_not_hold(what: str) -> None:
    chain, code, words = REFUSED[what]
    no = refused(W.trust(), chain)
    assert no.code == code
    assert words in str(no)


def test_a_withdrawal_puts_a_member_out_and_a_new_certificate_lets_it_in_again() -> None:
    trust = W.trust()
    assert trust.withdraw(W.withdrawal("bob", by="founder"), LATER) == peer_of_key("bob")
    no = refused(trust, W.chain("ann", "bob"), LATER)
    assert no.code == "forbidden"
    assert "it was sold" in str(no)
    again = W.certificate("bob", by="ann", issued_ms=NOW_MS + 2000)
    assert trust.check((W.chain("ann")[0], again), LATER).peer == peer_of_key("bob")
    assert trust.withdrawn_ms(peer_of_key("bob")) == NOW_MS + 1000


def test_a_withdrawal_can_leave_some_roles() -> None:
    trust = W.trust()
    trust.withdraw(W.withdrawal("bob", by="ann", chain=W.chain("ann"), keeps=("serve",)), LATER)
    assert trust.check(W.chain("ann", "bob"), LATER).roles == {"ask", "serve"}
    assert refused(trust, W.chain("ann", "bob", "cleo"), LATER).code == "forbidden"  # bob may not invite any more


def test_members_whom_an_ousted_inviter_vouched_for_are_out_too() -> None:
    trust = W.trust()
    trust.withdraw(W.withdrawal("ann", by="founder"), LATER)
    assert refused(trust, W.chain("ann", "bob"), LATER).code == "forbidden"


def test_nobody_withdraws_an_equal() -> None:
    trust = W.trust()
    trust.withdraw(W.withdrawal("bob", by="ann", chain=W.chain("ann")), LATER)
    assert trust.check(W.chain("bob"), LATER).roles == set(ROLES)  # bob has his rights from the founder himself


def test_a_withdrawal_by_somebody_without_the_right() -> None:
    trust = W.trust()
    plain = W.certificate("eve", by="ann", roles=("serve",))
    for record in (
        W.withdrawal("bob", by="mallory"),
        W.withdrawal("bob", by="eve", chain=(W.chain("ann")[0], plain)),
        W.withdrawal("bob", by="eve", chain=W.chain("ann")),
        World(founder="mallory").withdrawal("bob", by="mallory"),
        W.withdrawal("bob", by="founder", issued_ms=LATER + MAX_CLOCK_MS + 1),
        b"",
    ):
        with pytest.raises(Untrusted):
            trust.withdraw(record, LATER)
    assert trust.withdrawals() == ()


def test_a_withdrawal_is_learned_once_and_an_older_one_of_the_same_signer_is_nothing_new() -> None:
    trust, record = W.trust(), W.withdrawal("bob", by="founder")
    assert trust.withdraw(record, LATER) is not None
    assert trust.withdraw(record, LATER) is None
    assert trust.withdraw(W.withdrawal("bob", by="founder", issued_ms=NOW_MS), LATER) is None


def test_what_a_superior_leaves_and_what_its_own_inviter_leaves_are_both_taken_off() -> None:
    trust, ann = W.trust(), W.chain("ann")
    trust.withdraw(W.withdrawal("bob", by="founder", keeps=("serve", "publish")), LATER)
    trust.withdraw(W.withdrawal("bob", by="ann", chain=ann, keeps=("serve",)), LATER)
    trust.withdraw(W.withdrawal("ann", by="founder", keeps=("invite",)), LATER)
    assert trust.check(ann, LATER).roles == {"invite"}
    assert trust.check(W.chain("ann", "bob"), LATER).roles == {"ask", "serve"}


@pytest.mark.parametrize("keeps", [(), ("serve",)], ids=["out", "may not invite any more"])
def test_the_word_of_an_ousted_inviter_counts_no_more(keeps: tuple[str, ...]) -> None:
    trust = W.trust()
    trust.withdraw(W.withdrawal("cleo", by="bob", chain=W.chain("ann", "bob")), LATER)
    assert refused(trust, W.chain("ann", "bob", "cleo"), LATER).code == "forbidden"
    renewed = W.chain("ann", "dan", "cleo")
    assert refused(trust, renewed, LATER).code == "forbidden"
    trust.withdraw(W.withdrawal("bob", by="ann", chain=W.chain("ann"), keeps=keeps), LATER)
    assert trust.check(renewed, LATER).peer == peer_of_key("cleo")
