"""Lines of a conversation, and prompts, that are no text; without a node."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.api.messages import Answer
from meshnode.cli import chat
from meshnode.cli.main import main
from meshnode.client import Client
from meshnode.text.question import Question

Piped = Callable[[bytes], None]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Piped:
    return lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_a_line_that_is_no_text_does_not_end_a_conversation(
    piped: Piped, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(_: Client, question: Question) -> Answer:
        asked.append([turn["content"] for turn in question.messages or ()])
        return Answer(text="yes", reason="eos")

    monkeypatch.setattr(Client, "check", lambda self: None)
    monkeypatch.setattr(chat, "print_answer", answer)
    piped("one\nOl\u00e9 \n".encode() + b"\xd6l\nthree\n")
    assert main(["chat"]) == 2, "a program that pipes lines in hears of it"
    assert asked == [["one"], ["one", "yes", "Ol\u00e9"], ["one", "yes", "Ol\u00e9", "yes", "three"]]
    assert "was not UTF-8" in capsys.readouterr().err


def test_a_prompt_that_is_no_text(piped: Piped, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    piped(b"\xd6l")
    assert main(["generate", "--prompt-file", "-"]) == 2
    assert "standard input can't be read: it is not UTF-8 text (byte 0)" in capsys.readouterr().err


def test_a_configuration_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_bytes(b"# \xd6l")
    assert main(["config", "--data", str(tmp_path)]) == 2
    assert "config.toml can't be read: it is not UTF-8 text (byte 2)." in capsys.readouterr().err
