"""The state file."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.core.errors import ConfigError, Declined, DiskError
from meshnode.state.database import MAX_ADDRESSES, MAX_PEERS, MIGRATIONS, Database
from meshnode.state.port import Invite
from protocols.ids import PeerId
from tests.unit.membership_actors import NOW_MS, peer_of_key

SECRET = b"s" * 16
INVITE = Invite(
    id=b"i" * 16,
    secret_hash=hashlib.sha256(SECRET).digest(),
    roles=("serve", "train"),
    uses=1,
    created_ms=NOW_MS,
    expires_ms=NOW_MS + 1000,
)
ANN, BOB, CLEO = (peer_of_key(name) for name in ("ann", "bob", "cleo"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "state.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with Database(path) as opened:
        yield opened


def refused(
    database: Database, peer: PeerId = BOB, secret: bytes = SECRET, wall_ms: int = NOW_MS, **more: int
) -> str:
    with pytest.raises(Declined) as caught:
        database.redeem(INVITE.id, secret, peer, wall_ms, **more)
    return caught.value.code


def test_only_the_owner_can_read_it(database: Database, path: Path) -> None:
    database.put_record("head", ANN, b"x")
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.parent.iterdir())


def test_one_use_is_one_use(database: Database) -> None:
    database.add_invite(INVITE)
    assert database.redeem(INVITE.id, SECRET, ANN, NOW_MS).roles == ("serve", "train")
    assert refused(database, BOB) == "invite-used"
    assert database.redeem(INVITE.id, SECRET, ANN, NOW_MS).id == INVITE.id  # the same node may come again
    assert [invite.used for invite in database.invites()] == [1]


def test_uses_are_counted_across_restarts_and_processes(database: Database, path: Path) -> None:
    database.add_invite(INVITE)
    with Database(path) as other:
        other.redeem(INVITE.id, SECRET, ANN, NOW_MS)
    assert refused(database) == "invite-used"
    with Database(path) as third:
        assert refused(third) == "invite-used"


def test_an_expired_invite_helps_nobody(database: Database) -> None:
    database.add_invite(INVITE)
    database.redeem(INVITE.id, SECRET, ANN, NOW_MS + 999)
    assert refused(database, ANN, wall_ms=NOW_MS + 1000) == "invite-expired"


def test_unknown_and_wrong_are_the_same_sentence(database: Database) -> None:
    texts = []
    for secret, known in ((SECRET, False), (b"x" * 16, True)):
        if known:
            database.add_invite(INVITE)
        with pytest.raises(Declined) as caught:
            database.redeem(INVITE.id, secret, ANN, NOW_MS)
        texts.append((caught.value.code, str(caught.value)))
    assert texts[0] == texts[1]
    assert texts[0][0] == "forbidden"


def test_an_invite_made_before_the_withdrawal_does_not_undo_it(database: Database) -> None:
    database.add_invite(INVITE)
    database.redeem(INVITE.id, SECRET, ANN, NOW_MS)
    assert refused(database, ANN, not_before_ms=NOW_MS + 1) == "forbidden"
    assert database.redeem(INVITE.id, SECRET, ANN, NOW_MS, not_before_ms=NOW_MS - 1) is not None


def test_an_invite_for_many_and_a_revoked_one(database: Database) -> None:
    many = Invite(
        id=b"m" * 16, secret_hash=INVITE.secret_hash, roles=(), uses=0, created_ms=NOW_MS, expires_ms=0, member_ms=5
    )
    database.add_invite(many)
    for peer in (ANN, BOB, CLEO):
        assert database.redeem(many.id, SECRET, peer, NOW_MS).member_ms == 5
    assert database.revoke_invite(many.id)
    assert not database.revoke_invite(many.id)
    with pytest.raises(Declined):
        database.redeem(many.id, SECRET, ANN, NOW_MS)


def test_serials_count_up(database: Database, path: Path) -> None:
    assert [database.next_serial() for _ in range(3)] == [1, 2, 3]
    with Database(path) as again:
        assert again.next_serial() == 4


def test_peers_are_remembered_last_seen_first(database: Database, path: Path) -> None:
    database.remember_peer(ANN, ["/a/1", "/a/2"], 100)
    database.remember_peer(BOB, ["/b"], 200)
    database.remember_peer(ANN, ["/a/2"], 300)
    with Database(path) as again:
        assert list(again.known_peers().items()) == [(ANN, ("/a/2", "/a/1")), (BOB, ("/b",))]
    database.forget_peer(ANN)
    assert list(database.known_peers()) == [BOB]


def test_what_is_remembered_is_bounded(database: Database) -> None:
    for time in range(MAX_ADDRESSES + 3):
        database.remember_peer(ANN, [f"/a/{time}"], time)
    assert len(database.known_peers()[ANN]) == MAX_ADDRESSES
    assert "/a/0" not in database.known_peers()[ANN]
    for number in range(MAX_PEERS + 1):
        database.remember_peer(PeerId(f"peer{number}"), ["/x"], 1000 + number)
    known = database.known_peers()
    assert len(known) == MAX_PEERS
    assert ANN not in known and "peer0" not in known


def test_records_are_one_per_kind_and_signer(database: Database) -> None:
    database.put_record("head", BOB, b"1")
    database.put_record("head", BOB, b"2")
    database.put_record("head", ANN, b"3")
    database.put_record("advert", BOB, b"4")
    assert database.records("head") == {ANN: b"3", BOB: b"2"}
    assert database.record("head", BOB) == b"2"
    assert database.record("head", CLEO) is None
    database.remove_record("head", BOB)
    assert database.records("head") == {ANN: b"3"}
    assert database.records("advert") == {BOB: b"4"}


def test_a_file_that_is_no_database_is_one_sentence(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database, and long enough to be seen as one" * 100)
    with pytest.raises(DiskError, match=str(path)):
        Database(path)


def test_a_folder_in_its_place_is_one_sentence(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(DiskError, match=str(path)):
        Database(path)


def test_a_file_of_a_newer_version_is_left_alone(database: Database, path: Path) -> None:
    database.put_record("head", ANN, b"1")
    database.close()
    with sqlite3.connect(path) as raw:
        raw.execute("INSERT INTO migrations VALUES (?)", (len(MIGRATIONS) + 1,))
    raw.close()
    with pytest.raises(ConfigError, match="newer meshnode"):
        Database(path)


def test_a_full_disk_is_one_sentence_and_loses_nothing(database: Database) -> None:
    database.put_record("head", ANN, b"1")
    database._db.execute("PRAGMA max_page_count=1")
    with pytest.raises(DiskError, match="Free some disk space"):
        database.put_record("head", BOB, bytes(1 << 20))
    database._db.execute("PRAGMA max_page_count=1000000")
    database.put_record("head", CLEO, b"3")
    assert database.records("head") == {ANN: b"1", CLEO: b"3"}
