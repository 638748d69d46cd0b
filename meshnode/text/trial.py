"""A trial of the tokenizer's process on this device: a real child process, a toy tokenizer, a text of known ids."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from meshnode.core.errors import Declined, ModelError, TokenizerLost
from meshnode.core.reasons import cause
from meshnode.text.port import TokenizerFiles
from meshnode.text.process import open_tokenizer

_WORDS: Final = ("nothing", "one", "two", "three")
_TEXT: Final = "three one two"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTrial:
    """What came of it. `problem` is a part of a sentence, empty when the ids were right."""

    confined: tuple[str, ...] = ()  # parts of the confinement that hold where questions are read
    problem: str = ""


async def try_text() -> TextTrial:
    """Start the process, have it read one text, stop it. What goes wrong is in the answer."""
    with tempfile.TemporaryDirectory(prefix="meshnode-trial-") as name:
        path = Path(name) / "tokenizer.json"
        try:
            path.write_text(json.dumps(_tokenizer()), encoding="utf-8")
            files = TokenizerFiles(model="trial", vocab=len(_WORDS), tokenizer=path, template=None, specials=None)
            process = await open_tokenizer(files)
            try:
                ids = await process.encode(_TEXT)
            finally:
                await process.aclose()
        except OSError as error:
            return TextTrial(problem=cause(error))
        except (Declined, ModelError, TokenizerLost) as error:
            return TextTrial(problem=str(error))
    wanted = tuple(_WORDS.index(word) for word in _TEXT.split())
    if ids != wanted:
        return TextTrial(problem=f"it read {_TEXT!r} as {list(ids)}; {list(wanted)} is right")
    return TextTrial(confined=process.confined)


def _tokenizer() -> dict[str, object]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(_WORDS)},
            "unk_token": _WORDS[0],
        },
    }


def try_text_now() -> TextTrial:
    """The same. Blocking."""
    return trio.run(try_text)
