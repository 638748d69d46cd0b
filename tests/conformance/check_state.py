"""The conformance suite of the state port: every check in `CHECKS` holds on every kind of state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from meshnode.core.errors import Declined
from meshnode.membership.port import Invite
from meshnode.state.port import MAX_ADDRESSES, MAX_PEERS, State
from protocols.ids import PeerId
from tests.unit.membership_actors import NOW_MS, peer_of_key

Open = Callable[[], State]  # the state of one node; what was written before is there again
Check = Callable[[Open], None]

SECRET: Final = b"s" * 16
INVITE: Final = Invite(
    id=b"i" * 16,
    secret_hash=hashlib.sha256(SECRET).digest(),
    roles=("serve", "publish"),
    uses=1,
    created_ms=NOW_MS,
    expires_ms=NOW_MS + 1000,
)
ANN, BOB, CLEO = (peer_of_key(name) for name in ("ann", "bob", "cleo"))


def refused(state: State, peer: PeerId = BOB, secret: bytes = SECRET, wall_ms: int = NOW_MS, **more: int) -> str:
    with pytest.raises(Declined) as caught:
        state.redeem(INVITE.id, secret, peer, wall_ms, **more)
    return caught.value.code


def check_one_use_is_one_use(open_state: Open) -> None:
    state = open_state()
    state.add_invite(INVITE)
    assert state.redeem(INVITE.id, SECRET, ANN, NOW_MS).roles == ("serve", "publish")
    assert refused(state, BOB) == "invite-used"
    assert state.redeem(INVITE.id, SECRET, ANN, NOW_MS).id == INVITE.id  # the same node may come again
    assert [invite.used for invite in state.invites()] == [1]


def check_uses_are_counted_across_restarts(open_state: Open) -> None:
    state = open_state()
    state.add_invite(INVITE)
    open_state().redeem(INVITE.id, SECRET, ANN, NOW_MS)
    assert refused(state) == "invite-used"
    assert refused(open_state()) == "invite-used"


def check_the_invites_of_one_peer_are_struck_and_no_others(open_state: Open) -> None:
    state = open_state()
    other = replace(INVITE, id=b"o" * 16, uses=0)
    later = replace(INVITE, id=b"l" * 16, created_ms=INVITE.created_ms + 1)
    for invite in (INVITE, other, later):
        state.add_invite(invite)
    state.redeem(INVITE.id, SECRET, ANN, NOW_MS)
    state.redeem(later.id, SECRET, ANN, NOW_MS)
    state.redeem(other.id, SECRET, BOB, NOW_MS)
    assert state.revoke_redeemed(ANN, INVITE.created_ms) == 1
    assert {invite.id for invite in open_state().invites() if not invite.revoked_ms} == {other.id, later.id}
    assert refused(state, ANN) == "forbidden"
    assert state.revoke_redeemed(ANN, INVITE.created_ms) == 0
    assert state.redeem(later.id, SECRET, ANN, NOW_MS).id == later.id


def check_an_expired_invite_helps_nobody(open_state: Open) -> None:
    state = open_state()
    state.add_invite(INVITE)
    state.redeem(INVITE.id, SECRET, ANN, NOW_MS + 999)
    assert refused(state, ANN, wall_ms=NOW_MS + 1000) == "invite-expired"


def check_unknown_and_wrong_are_the_same_sentence(open_state: Open) -> None:
    state = open_state()
    texts = []
    for secret, known in ((SECRET, False), (b"x" * 16, True)):
        if known:
            state.add_invite(INVITE)
        with pytest.raises(Declined) as caught:
            state.redeem(INVITE.id, secret, ANN, NOW_MS)
        texts.append((caught.value.code, str(caught.value)))
    assert texts[0] == texts[1]
    assert texts[0][0] == "forbidden"


def check_an_invite_made_before_the_withdrawal_does_not_undo_it(open_state: Open) -> None:
    state = open_state()
    state.add_invite(INVITE)
    state.redeem(INVITE.id, SECRET, ANN, NOW_MS)
    assert refused(state, ANN, not_before_ms=NOW_MS + 1) == "forbidden"
    assert state.redeem(INVITE.id, SECRET, ANN, NOW_MS, not_before_ms=NOW_MS - 1) is not None


def check_an_invite_for_many_and_a_revoked_one(open_state: Open) -> None:
    state = open_state()
    many = Invite(
        id=b"m" * 16,
        secret_hash=INVITE.secret_hash,
        roles=(),
        uses=0,
        created_ms=NOW_MS - 1,
        expires_ms=0,
        member_ms=5,
    )
    state.add_invite(INVITE)
    state.add_invite(many)
    assert state.invites() == (many, INVITE)
    for peer in (ANN, BOB, CLEO):
        assert state.redeem(many.id, SECRET, peer, NOW_MS).member_ms == 5
    assert state.revoke_invite(many.id, NOW_MS)
    assert not state.revoke_invite(many.id, NOW_MS + 1)
    assert not state.revoke_invite(b"n" * 16, NOW_MS)
    struck = next(invite for invite in open_state().invites() if invite.id == many.id)
    assert (struck.revoked_ms, struck.used, struck.usable(NOW_MS)) == (NOW_MS, 3, False)
    with pytest.raises(Declined):
        state.redeem(many.id, SECRET, ANN, NOW_MS)


def check_serials_count_up(open_state: Open) -> None:
    state = open_state()
    assert [state.next_serial() for _ in range(3)] == [1, 2, 3]
    assert open_state().next_serial() == 4


def check_peers_are_remembered_last_seen_first(open_state: Open) -> None:
    state = open_state()
    state.remember_peer(ANN, ["/a/1", "/a/2"], 100)
    state.remember_peer(BOB, ["/b"], 200)
    state.remember_peer(ANN, ["/a/2"], 300)
    state.remember_peer(ANN, ["/a/2"], 50)  # a clock that was set back
    assert list(open_state().known_peers().items()) == [(ANN, ("/a/2", "/a/1")), (BOB, ("/b",))]
    state.remember_peer(CLEO, [], 400)
    assert list(state.known_peers()) == [ANN, BOB]
    for peer in (ANN, CLEO):
        state.forget_peer(peer)
    assert list(open_state().known_peers()) == [BOB]


def check_what_is_remembered_is_bounded(open_state: Open) -> None:
    state = open_state()
    for time in range(MAX_ADDRESSES + 3):
        state.remember_peer(ANN, [f"/a/{time}"], time)
    assert len(state.known_peers()[ANN]) == MAX_ADDRESSES
    assert "/a/0" not in state.known_peers()[ANN]
    for number in range(MAX_PEERS + 1):
        state.remember_peer(PeerId(f"peer{number}"), ["/x"], 1000 + number)
    known = state.known_peers()
    assert len(known) == MAX_PEERS
    assert ANN not in known and "peer0" not in known


def check_records_are_one_per_kind_and_signer(open_state: Open) -> None:
    state = open_state()
    state.put_record("head", BOB, b"1")
    state.put_record("head", BOB, b"2")
    state.put_record("head", ANN, b"3")
    state.put_record("advert", BOB, b"4")
    assert list(open_state().records("head").items()) == sorted({ANN: b"3", BOB: b"2"}.items())
    assert state.record("head", BOB) == b"2"
    assert state.record("head", CLEO) is None
    assert state.records("nothing") == {}
    state.remove_record("head", BOB)
    state.remove_record("head", BOB)
    state.remove_record("nothing", BOB)
    assert state.records("head") == {ANN: b"3"}
    assert state.records("advert") == {BOB: b"4"}


CHECKS: Final[tuple[Check, ...]] = tuple(
    check for name, check in list(globals().items()) if name.startswith("check_")
)
