"""The node key and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from nacl.signing import SigningKey

from meshnode.core.errors import IdentityError
from meshnode.core.paths import Paths
from meshnode.membership.identity import Identity
from protocols.envelope import open_record
from protocols.ids import peer_id_of


def test_a_key_is_made_once_and_found_again(tmp_path: Path) -> None:
    assert not Identity.exists(tmp_path)
    made = Identity.create(tmp_path)
    found = Identity.load(tmp_path)
    assert (found.peer_id, found.seed) == (made.peer_id, made.seed)
    assert found.peer_id == peer_id_of(bytes(SigningKey(found.seed).verify_key))
    assert Paths(tmp_path).key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(IdentityError, match="exists already"):
        Identity.create(tmp_path)
    assert Identity.load(tmp_path).peer_id == made.peer_id


def test_it_signs_records(tmp_path: Path) -> None:
    identity = Identity.create(tmp_path)
    opened = open_record(identity.sign("advert", b"hello"), domain="advert")
    assert (opened.signer, opened.payload) == (identity.peer_id, b"hello")


def test_the_seed_is_in_no_text(tmp_path: Path) -> None:
    identity = Identity.create(tmp_path)
    assert identity.seed.hex() not in f"{identity!r} {identity} {vars(identity)!r}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    Identity.create(tmp_path)
    path = Paths(tmp_path).key
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.load(tmp_path)
    path.chmod(0o600)
    Identity.load(tmp_path)


def test_a_passphrase_protects_the_seed(tmp_path: Path) -> None:
    made = Identity.create(tmp_path, passphrase="correct horse")
    text = Paths(tmp_path).key.read_text()
    assert made.seed.hex() not in text and made.peer_id in text
    asked: list[str] = []

    def ask() -> str:
        asked.append("asked")
        return "correct horse"

    assert Identity.load(tmp_path, ask).seed == made.seed
    assert asked == ["asked"]
    with pytest.raises(IdentityError, match="is wrong"):
        Identity.load(tmp_path, "wrong")
    with pytest.raises(IdentityError, match="MESHNODE_PASSPHRASE"):
        Identity.load(tmp_path)


def test_a_plain_key_asks_for_nothing(tmp_path: Path) -> None:
    Identity.create(tmp_path)

    def ask() -> str:
        raise AssertionError("nobody needs a passphrase here")

    Identity.load(tmp_path, ask)


def test_a_missing_key(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="does not exist"):
        Identity.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "swap", "empty", "binary", "huge", "greedy", "owner"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, damage: str) -> None:
    Identity.create(tmp_path)
    path = Paths(tmp_path).key
    lines = path.read_text().split("\n")
    other = peer_id_of(bytes(SigningKey(bytes(32)).verify_key))
    path.write_bytes(
        {
            "cut": "\n".join(lines)[:-20].encode(),
            "swap": "\n".join(lines[::-1]).encode(),
            "empty": b"",
            "binary": bytes(range(256)),
            "huge": b"x" * 100_000,
            "greedy": "\n".join([*lines[:2], "argon2id 3 999999999999 00", "box 00", ""]).encode(),
            "owner": "\n".join([lines[0], f"peer {other}", lines[2], ""]).encode(),
        }[damage]
    )
    with pytest.raises(IdentityError, match=str(path)):
        Identity.load(tmp_path, "x")
