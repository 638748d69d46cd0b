"""Keys that hand over their place: a member's, an inviter's, a founder's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nacl.signing import SigningKey

from protocols.codec import encode
from protocols.envelope import open_record, sign_record
from protocols.membership import ROLES, Trust, Untrusted
from protocols.membership.messages import MAX_CLOCK_MS, SUCCESSION
from protocols.membership.renewal import open_renewal, sign_renewal
from protocols.membership.succession import read_succession, sign_succession
from tests.unit.membership_actors import NOW_MS, World, key_of, peer_of_key

W = World()
THEN, LATER = NOW_MS + 10_000, NOW_MS + 20_000


def moved(old: str, new: str, at: int = THEN) -> bytes:
    return sign_succession(key_of(old), key_of(new), W.trust().id, at)


def refused(trust: Trust, chain: tuple[bytes, ...], at: int = LATER) -> tuple[str, str]:
    with pytest.raises(Untrusted) as caught:
        trust.check(chain, at)
    return caught.value.code, str(caught.value)


ANN = W.chain("ann")
MOVED = (*ANN, moved("ann", "ann 2"))


def test_a_new_key_has_the_place_of_the_old_one() -> None:
    standing = W.trust().check(MOVED, LATER)
    assert (standing.peer, standing.distance, standing.roles) == (peer_of_key("ann 2"), 1, set(ROLES))
    again = W.trust().check((*MOVED, moved("ann 2", "ann 3", LATER)), LATER)
    assert again.peer == peer_of_key("ann 3") and again.is_founder


def test_the_old_key_is_none_any_more_where_that_is_known() -> None:
    trust = W.trust()
    assert trust.check(ANN, LATER).peer == peer_of_key("ann")
    assert set(trust.succeed(MOVED)) == {peer_of_key("ann")}
    assert trust.succeed(MOVED) == {}
    code, text = refused(trust, ANN)
    assert code == "forbidden" and "was replaced on" in text
    assert trust.check(ANN, THEN - 1).peer == peer_of_key("ann"), "what it signed before it did sign"
    assert trust.predecessors(peer_of_key("ann 2")) == (peer_of_key("ann"),)


def test_those_it_has_let_in_stay_and_it_lets_nobody_in_later() -> None:
    trust = W.trust()
    trust.succeed(MOVED)
    bob = (*ANN, W.certificate("bob", by="ann", roles=("serve",)))
    assert trust.check(bob, LATER).roles == {"ask", "serve"}
    late = (*ANN, W.certificate("eve", by="ann", roles=("serve",), issued_ms=THEN + 1))
    assert refused(trust, late)[0] == "forbidden"
    new = (*MOVED, W.certificate("cleo", by="ann 2", roles=("serve",), issued_ms=LATER))
    assert trust.check(new, LATER).distance == 2
    assert trust.inviter_of(new) == peer_of_key("ann 2")


def test_a_founders_key_hands_over_the_network() -> None:
    trust = W.trust()
    path = (moved("founder", "heir"),)
    dora = (*path, W.certificate("dora", by="heir", issued_ms=LATER))
    assert trust.check(dora, LATER).is_founder
    assert trust.check(ANN, LATER).is_founder, "nobody has to be let in again"
    trust.succeed(dora)
    assert refused(trust, (W.certificate("eve", by="founder", issued_ms=LATER),))[0] == "forbidden"
    old = W.withdrawal("ann", by="founder", issued_ms=LATER)
    trust.withdraw(old, LATER)
    assert trust.check(ANN, LATER).roles, "the old founder's word counts no more"
    trust.withdraw(W.withdrawal("ann", by="heir", chain=path, issued_ms=LATER), LATER)
    assert "withdrawn" in refused(trust, ANN)[1]
    secret = sign_renewal(key_of("heir"), trust.id, bytes(32), LATER, path)
    assert open_renewal(secret.renewal, bytes(32), trust, LATER) == secret
    with pytest.raises(Untrusted):
        open_renewal(sign_renewal(key_of("founder"), trust.id, bytes(32), LATER, ()).renewal, bytes(32), trust, LATER)
    records = {peer_of_key("founder"): path[0]}
    assert trust.founder_path(peer_of_key("heir"), records) == path
    assert trust.founder_path(peer_of_key("founder"), records) == ()


WRONG: dict[str, tuple[tuple[bytes, ...], str]] = {
    "a place that it does not have": ((*ANN, moved("bob", "eve")), "stranger"),
    "a founder that is none": ((moved("ann", "eve"), W.certificate("eve", by="eve")), "stranger"),
    "nothing but a founder's new key": ((moved("founder", "heir"),), "stranger"),
    "of another network": ((*ANN, sign_succession(key_of("ann"), key_of("eve"), "other", THEN)), "other-network"),
    "of the future": ((*ANN, moved("ann", "eve", LATER + MAX_CLOCK_MS + 1)), "clock"),
    "to itself": ((*ANN, moved("ann", "ann")), "stranger"),
    "far too often": ((*ANN, *(moved("ann", "ann 2"), moved("ann 2", "ann")) * 4), "stranger"),
    "another kind of record": ((*ANN, W.withdrawal("ann", by="ann")), "stranger"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_hands_nothing_over(what: str) -> None:
    chain, code = WRONG[what]
    assert refused(W.trust(), chain)[0] == code


def test_nobody_is_named_who_does_not_agree() -> None:
    good = read_succession(open_record(moved("ann", "ann 2"), domain=SUCCESSION))
    for forged in (
        replace(good, successor=peer_of_key("bob")),
        replace(good, issued_ms=good.issued_ms + 1),
        replace(good, consent=bytes(64)),
    ):
        record = sign_record(key_of("ann"), SUCCESSION, encode(forged))
        assert "did not agree" in refused(W.trust(), (*ANN, record))[1]
    borrowed = sign_record(key_of("bob"), SUCCESSION, encode(good))  # agreed to succeed ann, not bob
    assert "did not agree" in refused(W.trust(), (*W.chain("bob"), borrowed))[1]


def test_a_thief_of_the_old_key_comes_too_late_whatever_the_date() -> None:
    trust = W.trust()
    trust.succeed(MOVED)
    assert "already" in refused(trust, (*ANN, moved("ann", "thief", NOW_MS)))[1]


def test_a_withdrawal_of_the_new_key_or_of_the_old_one_holds() -> None:
    for who, at in (("ann 2", LATER), ("ann", THEN + 1)):
        trust = W.trust()
        trust.withdraw(W.withdrawal(who, by="founder", issued_ms=at), LATER)
        assert "withdrawn" in refused(trust, MOVED)[1]
    trust = W.trust()
    trust.withdraw(W.withdrawal("ann 2", by="founder", keeps=("serve",), issued_ms=LATER), LATER)
    assert trust.check(MOVED, LATER).roles == {"ask", "serve"}


def test_the_withdrawals_of_an_inviter_outlive_its_key() -> None:
    trust = W.trust()
    bob = (*ANN, W.certificate("bob", by="ann"))
    trust.withdraw(W.withdrawal("bob", by="ann", chain=ANN, issued_ms=THEN - 1), LATER)
    trust.succeed(MOVED)
    assert "withdrawn" in refused(trust, bob)[1]
    late = W.withdrawal("cleo", by="ann", chain=ANN, issued_ms=THEN + 1)
    trust.withdraw(late, LATER)
    assert trust.check((*ANN, W.certificate("cleo", by="ann")), LATER).roles
    trust.withdraw(W.withdrawal("cleo", by="ann 2", chain=MOVED, issued_ms=LATER), LATER)
    assert "withdrawn" in refused(trust, (*ANN, W.certificate("cleo", by="ann")))[1]


def test_keys_of_all_kinds_can_be_new() -> None:
    new = SigningKey(bytes(range(32)))
    record = sign_succession(key_of("ann"), new, W.trust().id, THEN)
    assert W.trust().check((*ANN, record), LATER).distance == 1
