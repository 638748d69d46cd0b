"""Answers of /v1/responses that a next request may go on from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from meshnode.http.body import Json
from meshnode.http.problems import Problem

KEPT: Final = 256  # answers
KEPT_CHARACTERS: Final = 8 << 20  # of all of them


@dataclass(frozen=True, slots=True)
class Past:
    """One answer: the conversation up to it, itself included, and the document that was given."""

    turns: tuple[Json, ...]
    document: Json

    @property
    def characters(self) -> int:
        return sum(len(turn["content"]) + len(repr(turn.get("tool_calls", ""))) for turn in self.turns)


class History:
    """The last answers, in memory: a restart forgets them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Past] = OrderedDict()
        self._characters = 0

    def keep(self, id: str, past: Past) -> None:
        """Remember it; the oldest go."""
        self._kept[id] = past
        self._characters += past.characters
        while len(self._kept) > KEPT or self._characters > KEPT_CHARACTERS:
            self.forget(next(iter(self._kept)))

    def find(self, id: str, *, param: str | None = None) -> Past:
        """Raises Problem 404."""
        past = self._kept.get(id)
        if past is None:
            raise Problem(
                404,
                "not_found",
                f"there is no response {id[:80]}: this node keeps the last {KEPT} until it stops, and none that said "
                "store: false. Send the whole conversation as input",
                param,
            )
        return past

    def forget(self, id: str) -> None:
        """Nothing happens when it is not there."""
        if (past := self._kept.pop(id, None)) is not None:
            self._characters -= past.characters
