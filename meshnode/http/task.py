"""What a dialect makes of a request: questions for the node, and a machine that says its answers in the dialect.

A machine does no input or output: it is fed with what happens, and gives the bytes to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from meshnode.api.asking import Event
from meshnode.api.messages import Answer
from meshnode.http.problems import Problem
from meshnode.text.question import Question

Json = dict[str, Any]


class Task(Protocol):
    """One request that asks. `questions`: the choices of the answer, in their order."""

    @property
    def id(self) -> str:
        """By which its receipt is found."""

    @property
    def questions(self) -> Sequence[Question]: ...

    @property
    def stream(self) -> bool:
        """Whether the answer is wanted in pieces."""

    @property
    def media_type(self) -> str:
        """Of the streamed answer."""

    @property
    def ping(self) -> bytes:
        """What tells a waiting client that we are there; empty: the dialect has nothing for that."""

    def document(self, answers: Sequence[Answer]) -> Json:
        """The whole answer, one for each question."""

    def feed(self, index: int, event: Event) -> bytes:
        """Something happened to a question: what is to be sent, which may be nothing."""

    def end(self, answers: Sequence[Answer]) -> bytes:
        """Every question is answered: the last bytes."""

    def fail(self, problem: Problem) -> bytes:
        """The answer ends in the middle: the last bytes."""
