"""What `meshnode generate` says beside the answer when stages are lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import pytest

from meshnode.api.messages import Answer, Piece, Receipt, Replaced
from meshnode.cli.main import main
from meshnode.client import Client
from meshnode.text.question import Question

PEER = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
KILLED = Replaced(peer=PEER, first=10, last=20, tokens=64, gap_ms=1138.2, reason="the connection ended")
UNKNOWN = Replaced(tokens=1, reason="no\x1b[31m token")


class Words:
    """An answer that comes in pieces, with a pause in the middle."""

    def __init__(self, waiting: Callable[[str], None]) -> None:
        self._waiting = waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        return None

    def __iter__(self) -> Iterator[Piece]:
        yield Piece("one", 1)
        self._waiting("layers 10-19 are missing")
        yield Piece(" two\n", 2)
        self._waiting("layers 10-19 are missing")

    def whole(self) -> Answer:
        return Answer(text="one two\n", reason="length", receipt=Receipt(replaced=(KILLED, UNKNOWN)))


def test_lost_stages_are_told_beside_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(_: Client, question: Question, *, waiting: Callable[[str], None]) -> Words:
        return Words(waiting)

    monkeypatch.setattr(Client, "ask", ask)
    assert main(["generate", "count"]) == 0
    out, err = capsys.readouterr()
    assert out == "one two\n\n", "the answer alone, whatever happens on the way"
    assert err.splitlines() == [
        "",  # ends the line of the answer that waits
        "Waiting for the mesh: layers 10-19 are missing.",
        "Waiting for the mesh: layers 10-19 are missing.",
        "[layers 10-19 of 12D3…iDEp were lost after 64 tokens; the answer went on after 1.1 s: the connection ended]",
        "[a stage was lost after 1 token; no token came after that: no\\x1b[31m token]",
    ]
