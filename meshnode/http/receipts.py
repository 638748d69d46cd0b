"""Who computed the last answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from meshnode.api.messages import Answer, Json
from meshnode.http.problems import Problem

KEPT: Final = 1024  # answers; a receipt has some hundred bytes


class Receipts:
    """The last answers' receipts, without their text."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Json] = OrderedDict()

    def keep(self, id: str, answers: Sequence[Answer]) -> None:
        """Remember it under the id of the answer."""
        self._kept[id] = {"id": id, "object": "receipt", "answers": [receipt_of(answer) for answer in answers]}
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, id: str) -> Json:
        """Raises Problem 404."""
        found = self._kept.get(id)
        if found is None:
            raise Problem(404, "not_found", f"there is no receipt {id[:80]}; the last {KEPT} of this node are kept")
        return found


def receipt_of(answer: Answer) -> Json:
    """One answer's, without what was asked and said. `answer`: what `feedback` takes."""
    document = answer.as_json()
    for name in ("text", "token_ids", "prompt_token_ids", "stopped_by", "id"):
        del document[name]
    return {
        "answer": answer.id,
        "prompt_tokens": len(answer.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
        **document,
    }
