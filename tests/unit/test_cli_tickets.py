"""What `init`, `invite`, `join` and `start` say about tickets and settings, in this very process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from meshnode.cli import start
from meshnode.cli.main import main
from meshnode.core.clock import wall_ms
from meshnode.core.errors import DECLINED_EXIT, EXIT_CODES, Declined, IdentityError
from meshnode.core.paths import Paths
from meshnode.membership.network import load_network
from meshnode.membership.roll import roll
from meshnode.state.database import Database
from protocols.ids import PeerId
from protocols.membership.messages import CODES
from tests.unit.test_rotation import member

LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/4999")


@pytest.fixture
def home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["init", "--data", str(tmp_path / "home"), *LISTEN]) == 0
    capsys.readouterr()
    return tmp_path / "home"


def ids_of(folder: Path) -> list[str]:
    with Database(Paths(folder).state) as state:
        return [invite.id.hex() for invite in state.invites()]


def test_a_revoked_ticket_is_listed_as_such(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(home)]
    (ticket,) = ids_of(home)
    assert main(["invite", "--revoke", ticket[:12], *data]) == 0
    assert "lets nobody in any more" in capsys.readouterr().out
    assert main(["invite", "--list", *data]) == 0
    assert f"{ticket[:12]}  0 of 1 uses" in (out := capsys.readouterr().out) and "revoked 20" in out
    assert main(["invite", "--revoke", ticket, *data]) == 0
    assert "was revoked already, on 20" in capsys.readouterr().out
    assert main(["invite", "--revoke", "0123456789", *data]) == 2
    assert "has given out no ticket '0123456789'" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "other"), [("--hours", "--uses"), ("--uses", "--hours")])
def test_the_flag_that_is_wrong_is_named_alone(
    home: Path, capsys: pytest.CaptureFixture[str], flag: str, other: str
) -> None:
    assert main(["invite", flag, "-1", "--data", str(home)]) == 2
    said = capsys.readouterr().err
    assert f"{flag} -1" in said and other not in said


def test_one_hour_is_one_hour(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for hours, words in (("1", "within 1 hour ("), ("1.5", "within 1.5 hours (")):
        assert main(["invite", "--hours", hours, "--data", str(home)]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("text", [b"", b" \n\r\n"])
def test_an_empty_ticket(
    tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert main(["join", "-", "--data", str(tmp_path / "data")]) == 2
    assert "there is no ticket: what was given is empty" in capsys.readouterr().err


def test_a_device_knows_its_own_name(home: Path) -> None:
    ours = load_network(home)
    with Database(Paths(home).state) as state:
        entry = roll(ours, state, PeerId(ours.trust().check(ours.chain, wall_ms()).peer), wall_ms())[0]
    assert entry.name


def test_start_says_that_tickets_name_another_address(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "run_node", lambda config: 0)
    data = ["--data", str(home), "--memory", "0"]
    assert main(["start", *data, *LISTEN]) == 0
    assert main(["start", *data]) == 0
    assert capsys.readouterr().err == ""
    assert main(["start", *data, "--listen", "/ip4/127.0.0.1/tcp/5001"]) == 0
    said = capsys.readouterr().err
    assert "1 ticket may name /ip4/127.0.0.1/tcp/4999, where this node does not listen now" in said
    (ticket,) = ids_of(home)
    assert main(["invite", "--revoke", ticket, "--data", str(home)]) == 0
    capsys.readouterr()
    assert main(["start", *data, "--listen", "/ip4/127.0.0.1/tcp/5001"]) == 0
    assert capsys.readouterr().err == "", "a ticket that lets nobody in misleads nobody"


@pytest.mark.parametrize(("memory", "words"), [("1KB", "only layers of small models"), ("999TB", "the device has")])
def test_odd_amounts_of_memory_are_said(
    home: Path, memory: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "run_node", lambda config: 0)
    assert main(["start", "--memory", memory, "--data", str(home)]) == 0
    assert words in capsys.readouterr().err


def test_a_data_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for command in ("init", "status", "start"):
        code = main([command, "--data", str(tmp_path / "file")])
        said = capsys.readouterr().err
        assert code and "Errno" not in said, said
    assert main(["init", "--data", str(tmp_path / "file")]) == 2
    assert "is a file, or lies in one, so it can't be a data folder" in capsys.readouterr().err


# ---------------------------------------------------------------- the same cause, the same code


def test_a_missing_role_has_one_code(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest = member(home, tmp_path / "guest", "guest", wall_ms, roles=("ask",))  # type: ignore[arg-type]
    owner = load_network(home).trust().check(load_network(home).chain, wall_ms()).peer
    with Database(Paths(home).state), Database(Paths(guest).state) as theirs:
        theirs.put_record("seen", owner, b"")
    for words in (
        ["invite", *LISTEN],
        ["model", "add", str(guest)],
        ["model", "serve", "tiny"],
        ["members", "renew-secret"],
    ):
        code = main([*words, "--data", str(guest)])
        said = capsys.readouterr().err
        assert code == 3 == IdentityError.exit_code, (words, said)


def test_every_refusal_of_a_ticket_has_the_code_of_a_bad_ticket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["join", "meshnode1abc", "--data", str(tmp_path)]) == 3
    assert "ticket" in capsys.readouterr().err
    clock = {"clock", "expired"}  # nobody's ticket is to blame
    assert {Declined(code, "no").exit_code for code in set(CODES) - clock} == {3}
    assert "ticket" in EXIT_CODES[3] and "role" in EXIT_CODES[3]
    assert set(DECLINED_EXIT.values()) <= EXIT_CODES.keys()
