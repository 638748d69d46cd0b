"""A model's tokenizer and chat template while it is published: in the same limited process that nodes ask.

They are foreign here, too: whoever adds a model has them from somebody else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import trio

from meshnode.core.errors import Declined, ModelError, TokenizerLost
from meshnode.text.port import TokenizerFiles
from meshnode.text.process import open_tokenizer

Result = TypeVar("Result")
_SAMPLE: Final = [{"role": "user", "content": "Why is the sky blue?"}]


def tokens_of(text: str, tokenizer: Path) -> tuple[int, ...]:
    """Token ids of a text. Blocking. Raises ModelError when tokenizer.json can't be used."""
    files = TokenizerFiles(model=tokenizer.parent.name, vocab=0, tokenizer=tokenizer)
    try:
        return _run(lambda: _encoded(files, text))
    except (Declined, TokenizerLost) as error:
        raise ModelError(f"tokenizer.json of the model can't be used: {error}.") from error


def _run(ask: Callable[[], Awaitable[Result]]) -> Result:
    """In a thread of its own: the caller's may run a trio already."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(trio.run, ask).result()


async def _encoded(files: TokenizerFiles, text: str) -> tuple[int, ...]:
    tokenizer = await open_tokenizer(files)
    try:
        return await tokenizer.encode(text)
    finally:
        await tokenizer.aclose()


def check_text(folder: Path, model: str, files: Sequence[str], vocab: int) -> None:
    """Read tokenizer, special tokens and template as a node will. Blocking. Raises ModelError when one can't be used.

    Args:
      folder: where they lie.
      files: names of all files of the model.
      vocab: tokens that it can give.
    """

    def path(name: str) -> Path | None:
        return folder / name if name in files else None

    template = path("chat_template.jinja")
    given = TokenizerFiles(
        model=model,
        vocab=vocab,
        tokenizer=folder / "tokenizer.json",
        template=template,
        specials=path("special_tokens_map.json"),
    )
    try:
        _run(lambda: _checked(given))
    except TokenizerLost as error:
        raise ModelError(f"{error}; the machine may be out of memory") from error


async def _checked(files: TokenizerFiles) -> None:
    tokenizer = await open_tokenizer(files)
    try:
        if max(await tokenizer.encode("Why is the sky blue?"), default=0) >= files.vocab:
            raise ModelError(
                f"the tokenizer of {files.model} has tokens beyond the {files.vocab} of the model; is it its own?"
            )
        if files.template is not None:
            await tokenizer.chat(_SAMPLE)
    except Declined:
        pass  # a text or a conversation that it doesn't take; others it may
    finally:
        await tokenizer.aclose()
