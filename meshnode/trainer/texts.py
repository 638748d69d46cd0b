"""Samples as token ids. The training text is input, a blank unless the input ends in one, and label; see `Row`.

Runs in the trainer only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from meshnode.core.errors import BadRequest, ModelError
from meshnode.trainer.port import Sample


@dataclass(frozen=True, slots=True)
class Row:
    """A text whose last tokens are to be predicted."""

    ids: tuple[int, ...]  # what the model is given: the input, and the label without its last token
    answer: tuple[int, ...]  # the label

    @property
    def first(self) -> int:
        """The position whose logits predict the first token of the label."""
        return len(self.ids) - len(self.answer)


class Texts:
    """The tokenizer of a model, as those who ask it use it."""

    def __init__(self, tokenizer: Path) -> None:
        """Raises ModelError when it can't be used."""
        try:
            self._fast: Any = Tokenizer.from_file(str(tokenizer))
            self._fast.no_truncation()
            self._fast.no_padding()
        except BaseException as error:  # its panics are no Exception
            raise ModelError(f"The tokenizer of the model can't be read: {str(error)[:200]}.") from error
        self._answers: dict[str, tuple[int, ...]] = {}

    def row(self, sample: Sample, label: str | None = None) -> Row:
        """A sample, with another label if one is given. Raises BadRequest when there is nothing to learn from it."""
        given = self._input(sample.input)
        answer = self.answer(sample.input, sample.label if label is None else label)
        if not given or not answer:
            raise BadRequest(
                f"A sample has no {'input' if not given else 'label'} ({sample.input[:40]!r}, {sample.label[:40]!r})."
            )
        return Row((*given, *answer[:-1]), answer)

    def answer(self, prompt: str, label: str) -> tuple[int, ...]:
        """The tokens of a label behind a prompt."""
        text = label if prompt[-1:].isspace() else f" {label}"
        if text not in self._answers:
            self._answers[text] = self._encode(text, special=False) if label else ()
        return self._answers[text]

    def _input(self, prompt: str) -> tuple[int, ...]:
        """As the prompt of a question: a token that begins every text comes once."""
        plain, marked = self._encode(prompt, special=False), self._encode(prompt, special=True)
        return plain if plain[:1] == marked[:1] else marked

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            return tuple(self._fast.encode(text, add_special_tokens=special).ids)
        except BaseException as error:
            raise ModelError(f"The tokenizer of the model failed on a text: {str(error)[:200]}.") from error


def short_enough(rows: Sequence[Row], most: int) -> list[Row]:
    """Those with at most so many tokens. Raises BadRequest when none is left."""
    kept = [row for row in rows if len(row.ids) + 1 <= most]
    if not kept:
        raise BadRequest(f"None of the {len(rows)} samples has at most {most} tokens.")
    return kept
