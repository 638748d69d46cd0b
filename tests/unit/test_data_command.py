"""`meshnode data` on the folder of a node, running or not: what it takes, shows, gives away and forgets."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meshnode.cli.main import main
from meshnode.core.paths import Paths
from meshnode.state.budget import SAMPLES, Budget, Limit, Plan
from meshnode.state.samples import Samples, is_sealed
from meshnode.state.samples_port import Limits

LINES = "".join(json.dumps({"input": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(10))


@dataclass
class Home:
    """The folder of a node, and the command line for it."""

    folder: Path
    captured: pytest.CaptureFixture[str]

    def __call__(self, *words: str, code: int = 0) -> str:
        """What a command prints; on standard error when it fails."""
        assert main(["data", *words, "--data", str(self.folder)]) == code
        out, err = self.captured.readouterr()
        return err if code else out

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))

    def file(self, text: str | bytes, name: str = "samples.jsonl") -> str:
        path = self.folder.parent / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)


@pytest.fixture
def home(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "node"
    assert main(["init", "home", "--data", str(folder), "--listen", "/ip4/127.0.0.1/tcp/4331"]) == 0
    capsys.readouterr()
    return Home(folder, capsys)


def test_import_list_export_forget(home: Home) -> None:
    assert "No samples. Import some" in home("list")
    told = home("import", home.file(LINES))
    assert told.splitlines() == [
        f"10 new samples from {home.folder.parent}/samples.jsonl; 10 to learn from, in 2 classes."
    ]
    assert "Here already: 10." in home("import", home.file(LINES))
    shown = home().splitlines()
    assert shown[0].startswith("10 samples, ")
    assert shown[0].endswith(
        ", not encrypted: 10 to learn from, in 2 classes, 10 of them new; 0 answers that nobody has judged"
    )
    assert len(home("list", "--limit", "3").splitlines()) == 3 + 3
    listed = home.json("list", "--limit", "2")
    assert (listed["summary"]["samples"], len(listed["samples"]), listed["privacy"]) == (10, 2, None)
    target = home.folder.parent / "out.csv"
    assert "10 samples written to" in home("export", str(target))
    assert target.stat().st_mode & 0o777 == 0o600
    first, second = listed["samples"]
    forgotten = home("forget", str(first["id"]), second["hash"][:8])
    assert forgotten == "2 samples forgotten, and used no more.\nNothing was trained on them.\n"
    again = home("import", str(target))
    assert again.splitlines()[1:] == [
        "Here already: 8.",
        "Forgotten once, and so left out: 2; --again takes them in.",
    ]
    assert home.json("import", str(target), "--again") == {"new": 2, "known": 8, "forgotten": 0, "evicted": 0}
    assert home.json("forget", "--all") == {"samples": 10, "windows": []}


def test_what_was_trained_on_a_sample_is_told(home: Home) -> None:
    home("import", home.file(LINES))
    with Samples(Paths(home.folder).samples, Limits(samples=99, size_bytes=9999), lambda: b"") as samples:
        samples.note_use([1], "bafyframe", 3)
        samples.note_use([1, 2], "bafyframe", 7)
    told = home("forget", "1", "2")
    assert "They were trained on in rounds 3 to 7 of the lineage bafyframe" in told
    assert "meshnode release rollback" in told


def test_from_and_to_pipes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    assert "10 new samples from standard input" in home("import", "-")
    lines = home("export", "-").splitlines()
    assert {json.loads(line)["input"] for line in lines} == {f"text {n}" for n in range(10)}


def test_nothing_is_taken_from_a_file_with_a_fault(home: Home) -> None:
    told = home("import", home.file(LINES + "{\n" + LINES.replace("text", "more")), code=2)
    assert told.splitlines()[-2].endswith("samples.jsonl can't be used:") and "line 11: no JSON" in told
    assert "No samples" in home()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("import", "/nowhere/file"), "/nowhere/file can't be read: No such file or directory"),
        (("import", "/"), "can't be read: Is a directory"),
        (("export", "/nowhere/file"), "/nowhere/file can't be written: No such file or directory"),
        (("forget",), "name the samples to forget"),
        (("forget", "1", "--all"), "name the samples to forget"),
        (("forget", "7"), "there is no sample '7'; `meshnode data list` shows their ids"),
        (("list", "--limit", "-1"), "--limit takes 0 (all) or more"),
    ],
)
def test_what_can_not_be_done(home: Home, words: tuple[str, ...], told: str) -> None:
    assert main(["data", *words, "--data", str(home.folder)]) in (2, 5)
    assert told in home.captured.readouterr().err


def test_where_no_node_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--data", str(tmp_path / "none")]) == 7
    assert "There is no node in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_encrypted_when_files_are(home: Home) -> None:
    (home.folder / "config.toml").write_text("[content]\nencrypt = true\n")
    home("import", home.file(LINES))
    path = Paths(home.folder).samples
    assert is_sealed(path)
    found = b"".join(file.read_bytes() for file in home.folder.glob("samples.sqlite*"))
    assert b"text 1" not in found
    assert "10 samples" in home() and " encrypted: " in home()
    (home.folder / "config.toml").write_text("")
    assert " encrypted: " in home(), "until the node starts without"
    assert main(["members", "new-key", "--data", str(home.folder)]) == 2
    assert "samples of this node are encrypted with its key" in home.captured.readouterr().err


def test_answers_of_which_nobody_knows_the_right_one(home: Home) -> None:
    with Samples(Paths(home.folder).samples, Limits(samples=99, size_bytes=9999), lambda: b"") as samples:
        for text in ("\x1b[31mWhy?", "How?"):
            samples.keep_answer(text, "out", 1)
        samples.judge(2, False, "", 2)
    assert "\\x1b[31mWhy?" in home("list")
    assert len(home("list", "--wrong").splitlines()) == 4 and "How?" in home("list", "--wrong")
    assert home("export", "-") == ""
    assert [json.loads(line)["output"] for line in home("export", "-", "--all").splitlines()] == ["out", "out"]


def test_room(home: Home) -> None:
    (home.folder / "config.toml").write_text("[learn]\nmax_samples = 16\n")
    many = "".join(json.dumps({"input": f"text {n}", "label": "a"}) + "\n" for n in range(40))
    assert "Removed to make room: 24; learn.max_samples" in home("import", home.file(many))
    assert "16 samples" in home()


def test_what_private_training_has_spent_is_shown(home: Home) -> None:
    with Budget(Paths(home.folder).privacy) as budget:
        budget.reserve(SAMPLES, Plan(rate=0.01, noise=1.0, steps=100), Limit(epsilon=8, delta=1e-5))
    assert "privacy: epsilon 1." in home() and "(delta 1e-05) in 100 steps" in home()


def test_a_target_that_exists_is_replaced_as_a_whole(home: Home) -> None:
    home("import", home.file(LINES))
    target = home.folder.parent / "out.jsonl"
    target.write_text("old")
    with Samples(Paths(home.folder).samples, Limits(samples=99, size_bytes=9999), lambda: b"") as samples:
        samples._db.execute("UPDATE samples SET body = x'5b' WHERE id = 1")
    assert "sample 1 in" in home("export", str(target), code=5)
    assert target.read_text() == "old" and not target.with_name("out.jsonl.part").exists()
    home("forget", "1")
    home("export", str(target))
    assert len(target.read_text().splitlines()) == 9
