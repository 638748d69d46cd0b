"""The state file: what the conformance suite can't ask of every state."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.core.errors import ConfigError, DiskError
from meshnode.state.database import MIGRATIONS, Database
from tests.unit.membership_actors import peer_of_key

ANN, BOB, CLEO = (peer_of_key(name) for name in ("ann", "bob", "cleo"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "state.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with Database(path) as opened:
        yield opened


def test_only_the_owner_can_read_it(database: Database, path: Path) -> None:
    database.put_record("head", ANN, b"x")
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.parent.iterdir())


@pytest.mark.parametrize("what", ["no database", "a folder"])
def test_what_is_in_its_place_is_one_sentence(path: Path, what: str) -> None:
    path.parent.mkdir()
    if what == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"this is no database, and long enough to be seen as one" * 100)
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


def test_each_trouble_has_its_own_remedy(tmp_path: Path) -> None:
    path = tmp_path / "damaged.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(DiskError, match="It is damaged: stop the node, move it away") as caught:
        Database(path)
    assert "disk space" not in str(caught.value)
    path = tmp_path / "busy.sqlite"
    Database(path).close()
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DiskError, match="Another program holds it; try again"):
            Database(path)
    other.close()
