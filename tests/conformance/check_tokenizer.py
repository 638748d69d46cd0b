"""The conformance suite of the tokenizer port: every check in `CHECKS` holds wherever a tokenizer runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from meshnode.core.errors import Declined, ModelError
from meshnode.text.port import OpenTokenizer, Tokenizer
from tests.text_files import byte_tokenizer, text_files

Check = Callable[[OpenTokenizer, Path], Awaitable[None]]
TURNS: Final = [{"role": "user", "content": "hé {{ 7 * 7 }} 🎲"}]


@asynccontextmanager
async def _opened(open_tokenizer: OpenTokenizer, folder: Path, **files: Any) -> AsyncIterator[Tokenizer]:
    tokenizer = await open_tokenizer(text_files(folder, **files))
    try:
        yield tokenizer
    finally:
        await tokenizer.aclose()
    assert tokenizer.lost


async def texts_become_tokens(open_tokenizer: OpenTokenizer, folder: Path) -> None:
    fast = byte_tokenizer()
    async with _opened(open_tokenizer, folder) as tokenizer:
        for text in ("", "a", "für 🎲 \ufffd", "x\x00y" * 5000):
            assert await tokenizer.encode(text) == tuple(fast.encode(text).ids)


async def turns_become_tokens(open_tokenizer: OpenTokenizer, folder: Path) -> None:
    async with _opened(open_tokenizer, folder) as tokenizer:
        wanted = "[user]hé {{ 7 * 7 }} 🎲[assistant]"
        assert await tokenizer.chat(TURNS) == tuple(byte_tokenizer().encode(wanted).ids)
        assert await tokenizer.render(TURNS) == wanted


async def tokens_become_text(open_tokenizer: OpenTokenizer, folder: Path) -> None:
    ids = byte_tokenizer().encode("für 🎲</s> \ufffd").ids
    async with _opened(open_tokenizer, folder) as tokenizer:
        stream = tokenizer.stream()
        assert "".join([stream.feed(token) for token in [*ids, 99999, -1]]) + stream.rest() == "für 🎲 \ufffd"


async def templates_know_the_special_tokens(open_tokenizer: OpenTokenizer, folder: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}{{ extra[1] }}"
    given = {"bos_token": "<s>", "eos_token": "!", "extra": ["a", "b"]}
    async with _opened(open_tokenizer, folder, template=template, specials=given) as tokenizer:
        assert await tokenizer.chat(TURNS) == (0, *byte_tokenizer().encode("hé {{ 7 * 7 }} 🎲!b").ids)


async def a_tokenizer_cuts_and_fills_nothing(open_tokenizer: OpenTokenizer, folder: Path) -> None:
    """A tokenizer.json may bring settings of its training."""
    fast = byte_tokenizer()
    fast.enable_truncation(4)
    fast.enable_padding(length=8)
    async with _opened(open_tokenizer, folder, tokenizer=fast.to_str()) as tokenizer:
        assert await tokenizer.encode("abcdef") == tuple(byte_tokenizer().encode("abcdef").ids)
        assert await tokenizer.encode("a") == tuple(byte_tokenizer().encode("a").ids)


async def what_is_wrong_is_said(open_tokenizer: OpenTokenizer, folder: Path) -> None:
    async with _opened(open_tokenizer, folder, template=None) as tokenizer:
        with pytest.raises(ModelError, match="no chat template"):
            await tokenizer.chat(TURNS)
        with pytest.raises(ModelError, match="no chat template"):
            await tokenizer.render(TURNS)
    async with _opened(
        open_tokenizer, folder, template="{{ raise_exception('no ' + messages[0].role) }}"
    ) as tokenizer:
        with pytest.raises(Declined, match="refuses these turns: no user"):
            await tokenizer.chat(TURNS)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": b"\xff\x00"}, "tokenizer can't be read"),
        ({"tokenizer": "{}"}, "tokenizer can't be read"),
        ({"template": "{% for %}"}, "template can't be read"),
        ({"template": b"\xff"}, "template can't be read"),
        ({"specials": "[1]"}, "special_tokens_map.json of the model can't be read"),
    ]
    for files, words in wrong:
        with pytest.raises(ModelError, match=words):
            await open_tokenizer(text_files(folder, **files))


CHECKS: Final[tuple[Check, ...]] = (
    texts_become_tokens,
    turns_become_tokens,
    tokens_become_text,
    templates_know_the_special_tokens,
    a_tokenizer_cuts_and_fills_nothing,
    what_is_wrong_is_said,
)
