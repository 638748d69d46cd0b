"""Notices: who may give which, how long they hold, the vectors of the wire."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.advert.validate import MAX_AHEAD_MS, Early
from protocols.advert.view import Outcome, View
from protocols.codec import decode, encode
from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.membership.messages import ROLES, TRAIN
from protocols.notice.messages import (
    DELTA,
    HOLDS_S,
    LESSON,
    MAX_CONTENT_BYTES,
    ROLE_OF,
    Notice,
    check_notice,
)
from tests.adverts import NOW_MS, key_of, peer_of
from tests.vectors import Case, hold

PLAIN = Notice(peer=peer_of(1), incarnation=NOW_MS, sequence=0, kind=DELTA, content=b"what I learned")


def signed(notice: Notice, *, domain: str = DELTA, signer: int = 1) -> bytes:
    return sign_record(key_of(signer), domain, encode(notice))


def view_of(*roles: str) -> View:
    def roles_of(_peer: PeerId) -> frozenset[str]:
        return frozenset(roles)

    return View(roles_of)


def opened(data: bytes) -> Notice:
    record = open_record(data)
    notice = decode(Notice, record.payload)
    check_notice(notice, record.domain, record.signer)
    return notice


def test_vectors() -> None:
    hold(
        "notice",
        [
            Case("a delta", signed(PLAIN), PLAIN),
            Case("taken back", signed(replace(PLAIN, content=b"")), replace(PLAIN, content=b"")),
            Case("of somebody else", signed(PLAIN, signer=2)),
            Case("of another kind than its record", signed(PLAIN, domain=LESSON)),
            Case("damaged", signed(PLAIN)[:-1] + b"\x00"),
        ],
        opened,
    )


def test_every_kind_needs_a_role_that_exists() -> None:
    assert set(ROLE_OF.values()) <= set(ROLES)


@pytest.mark.parametrize("kind", ROLE_OF)
def test_a_notice_counts_with_its_role_alone(kind: str) -> None:
    notice = replace(PLAIN, kind=kind)
    others = view_of(*(role for role in ROLES if role != ROLE_OF[kind]))
    assert others.accept(signed(notice, domain=kind), 0.0, NOW_MS)[0] is Outcome.STRANGER
    assert not others.alive(kind, 0.0)
    view = view_of(ROLE_OF[kind])
    assert view.accept(signed(notice, domain=kind), 0.0, NOW_MS)[0] is Outcome.CHANGED
    assert [entry.body for entry in view.alive(kind, 0.0).values()] == [notice]


def test_a_notice_ends_unless_it_is_renewed() -> None:
    view = view_of(TRAIN)
    view.accept(signed(PLAIN), 0.0, NOW_MS)
    assert view.alive(DELTA, HOLDS_S - 1) and not view.alive(DELTA, HOLDS_S)
    again = replace(PLAIN, incarnation=NOW_MS + 1)
    assert view.accept(signed(again), HOLDS_S - 2, NOW_MS)[0] is Outcome.RENEWED
    assert view.alive(DELTA, 2 * HOLDS_S - 3)


def test_a_notice_of_the_future_is_not_believed_yet() -> None:
    ahead = replace(PLAIN, incarnation=NOW_MS + MAX_AHEAD_MS + 60_000)
    with pytest.raises(Early, match=r"the delta of .* is dated 11 min ahead"):
        view_of(TRAIN).accept(signed(ahead), 0.0, NOW_MS)


def test_two_notices_of_one_version_count_neither() -> None:
    view = view_of(TRAIN)
    view.accept(signed(PLAIN), 0.0, NOW_MS)
    assert view.accept(signed(replace(PLAIN, content=b"else")), 1.0, NOW_MS)[0] is Outcome.CONFLICT
    assert not view.alive(DELTA, 1.0)


def test_a_notice_has_a_limit() -> None:
    with pytest.raises(RemoteProtocolError):
        decode(Notice, encode(replace(PLAIN, content=b"x" * MAX_CONTENT_BYTES)).replace(b"x", b"xx", 1))
