"""Chains, roles, expiry, withdrawals."""

from __future__ import annotations

import itertools

import pytest

from protocols.codec import encode
from protocols.envelope import sign_record
from protocols.membership import ROLES, Standing, Trust, Untrusted
from protocols.membership.messages import MAX_CERTIFICATE_BYTES, MAX_CLOCK_MS, Certificate
from tests.unit.membership_actors import NOW_MS, World, key_of, peer_of_key

W = World()
LATER = NOW_MS + 60_000


def refused(trust: Trust, chain: tuple[bytes, ...], wall_ms: int = NOW_MS) -> Untrusted:
    with pytest.raises(Untrusted) as caught:
        trust.check(chain, wall_ms)
    return caught.value


def test_a_chain_gives_peer_roles_and_distance() -> None:
    standing = W.trust().check(W.chain("ann", "bob", "cleo", roles=("serve", "vote")), NOW_MS)
    assert (standing.peer, standing.distance) == (peer_of_key("cleo"), 3)
    assert standing.roles == {"serve", "vote"}


def test_the_earliest_expiry_of_a_chain_counts() -> None:
    ann = W.certificate("ann", by="founder", expires_ms=NOW_MS + 500)
    bob = W.certificate("bob", by="ann", expires_ms=NOW_MS + 900)
    assert W.trust().check((ann, bob), NOW_MS).expires_ms == NOW_MS + 500
    assert refused(W.trust(), (ann, bob), NOW_MS + 500).code == "expired"


def test_no_certificate_or_too_many() -> None:
    assert refused(W.trust(), ()).code == "stranger"
    assert refused(W.trust(), W.chain("a", "b", "c", "d")).code == "stranger"


def test_another_founder_is_another_network() -> None:
    assert refused(W.trust(), World(founder="mallory").chain("ann")).code == "other-network"


def test_a_certificate_that_nobody_trusted_signed() -> None:
    forged = W.certificate("mallory", by="mallory")
    no = refused(W.trust(), (forged,))
    assert no.code == "stranger"
    assert "signed by nobody this network trusts" in str(no)


def test_a_chain_with_a_gap() -> None:
    assert refused(W.trust(), (W.chain("ann")[0], W.certificate("cleo", by="bob"))).code == "stranger"


def test_only_an_admin_can_vouch() -> None:
    ann = W.certificate("ann", by="founder", roles=("serve",))
    no = refused(W.trust(), (ann, W.certificate("bob", by="ann", roles=("serve",))))
    assert no.code == "forbidden"
    assert "no admin" in str(no)


def test_nobody_gives_a_role_that_it_lacks() -> None:
    ann = W.certificate("ann", by="founder", roles=("serve", "admin"))
    no = refused(W.trust(), (ann, W.certificate("bob", by="ann", roles=("serve", "publish"))))
    assert no.code == "forbidden"
    assert "'publish'" in str(no)


def test_every_flipped_bit_breaks_a_certificate() -> None:
    (good,) = W.chain("ann")
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert refused(W.trust(), (bytes(bad),)).code in ("stranger", "other-network")


def test_a_certificate_from_the_future() -> None:
    ann = W.certificate("ann", by="founder", issued_ms=NOW_MS + MAX_CLOCK_MS + 1)
    assert refused(W.trust(), (ann,)).code == "clock"


def test_a_padded_certificate_is_refused_before_it_is_parsed() -> None:
    assert refused(W.trust(), (bytes(MAX_CERTIFICATE_BYTES + 1),)).code == "stranger"


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
    assert trust.check(W.chain("ann", "bob"), LATER).roles == {"serve"}
    assert refused(trust, W.chain("ann", "bob", "cleo"), LATER).code == "forbidden"  # bob is no admin any more


def test_members_whom_an_ousted_admin_vouched_for_are_out_too() -> None:
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


def test_the_verdict_does_not_depend_on_the_order_of_the_withdrawals() -> None:
    ann, bob = W.chain("ann"), W.chain("ann", "bob")
    records = [
        W.withdrawal("bob", by="ann", chain=ann, keeps=("serve",)),
        W.withdrawal("cleo", by="bob", chain=bob),
        W.withdrawal("dan", by="founder", keeps=("vote",)),
        W.withdrawal("ann", by="founder", keeps=("admin",)),
        W.withdrawal("bob", by="founder", keeps=("serve", "vote")),
    ]

    def verdicts(order: tuple[bytes, ...]) -> list[Standing | str]:
        trust = W.trust()
        for record in order:
            trust.withdraw(record, LATER)
        out: list[Standing | str] = []
        for chain in (ann, bob, W.chain("ann", "bob", "cleo"), W.chain("dan")):
            try:
                out.append(trust.check(chain, LATER))
            except Untrusted as no:
                out.append(f"{no.code} {no}")
        return out

    results = [verdicts(order) for order in itertools.permutations(records)]
    assert all(result == results[0] for result in results)
    assert [getattr(verdict, "roles", None) for verdict in results[0]] == [{"admin"}, {"serve"}, None, {"vote"}]


def test_the_word_of_an_ousted_admin_counts_no_more() -> None:
    trust = W.trust()
    trust.withdraw(W.withdrawal("cleo", by="bob", chain=W.chain("ann", "bob")), LATER)
    assert refused(trust, W.chain("ann", "bob", "cleo"), LATER).code == "forbidden"
    renewed = W.chain("ann", "dan", "cleo")
    assert refused(trust, renewed, LATER).code == "forbidden"
    trust.withdraw(W.withdrawal("bob", by="ann", chain=W.chain("ann")), LATER)
    assert trust.check(renewed, LATER).peer == peer_of_key("cleo")


def test_records_are_bound_to_their_kind() -> None:
    payload = encode(Certificate(network=W.trust().id, peer=peer_of_key("eve"), roles=("admin",), issued_ms=NOW_MS))
    assert refused(W.trust(), (sign_record(key_of("founder"), "advert", payload),)).code == "stranger"
