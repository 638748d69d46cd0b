"""A tokenizer without a process, for simulations in virtual time and for tests. No limits hold here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio

from meshnode.text.decoding import Decoder, TextStream
from meshnode.text.grammar import Walk
from meshnode.text.limits import Limits
from meshnode.text.port import TokenizerFiles
from meshnode.text.question import Turn
from meshnode.text.tokenizer import ModelText
from meshnode.text.tools import Tool


async def open_in_process(files: TokenizerFiles) -> TokenizerInProcess:
    """See `port.OpenTokenizer`."""
    await trio.lowlevel.checkpoint()
    return TokenizerInProcess(files)


class TokenizerInProcess:
    """Implements `Tokenizer` (port.py)."""

    def __init__(self, files: TokenizerFiles) -> None:
        text = ModelText(Limits())
        text.read_tokenizer(files.tokenizer.read_bytes(), _read(files.specials))
        text.read_template(_read(files.template))
        self._text = text
        self._vocabulary = text.vocabulary(files.vocab)
        if files.eos:
            text.read_grammars(files.tokenizer.read_bytes(), files.vocab, files.eos)
        self._decoder = Decoder(text.decoder())
        self.style = text.style
        self.lost = False

    async def encode(self, text: str) -> tuple[int, ...]:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        return tuple(self._text.encode(text))

    async def chat(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        return tuple(self._text.chat(turns, tools))

    async def render(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        return self._text.render(turns, tools)

    async def guide(self, kind: str, text: bytes) -> GuideInProcess:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        return GuideInProcess(self._text.guide(kind, text.decode(errors="replace")))

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """See port.py."""
        return TextStream(self._vocabulary, self._decoder, prompt)

    async def aclose(self) -> None:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        self.lost = True


class GuideInProcess:
    """Implements `Guide` (port.py)."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._mask = walk.mask()

    async def mask(self) -> bytes:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        return self._mask

    async def take(self, token: int) -> None:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        self._walk.take(token)
        self._mask = self._walk.mask()

    def close(self) -> None:
        """See port.py."""


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
