"""What the node sees of a tokenizer. Whose code runs where: `process.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from meshnode.text.decoding import TextStream
from meshnode.text.question import Turn
from meshnode.text.tools import Tool

MAX_TOKENIZER_BYTES: Final = 64 << 20  # the largest of current models (262,144 words) has 34 MB
MAX_TEMPLATE_BYTES: Final = 1 << 20  # the longest of current models have 20 KB
MAX_SPECIALS_BYTES: Final = 1 << 18  # special_tokens_map.json
BAD_GRAMMAR: Final = "bad-grammar"
NO_GRAMMAR: Final = "no-grammar"  # grammars can't be used here; elsewhere they may be


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """The files of a model that concern text. They stay readable until the tokenizer is open."""

    model: str  # its name, for error sentences
    vocab: int  # tokens that the model can give
    tokenizer: Path  # tokenizer.json
    template: Path | None = None  # chat_template.jinja
    specials: Path | None = None  # special_tokens_map.json: what templates call bos_token, eos_token, ...
    eos: tuple[int, ...] = ()  # tokens that end an answer, where grammars are wanted, too


class Guide(Protocol):
    """What says which tokens may come, so that an answer has the form that was asked for."""

    async def mask(self) -> bytes:
        """For the token that comes next: a bit for each, the lowest bit of the first byte for token 0.

        Raises Declined `bad-grammar` (the grammar takes too much) or `no-grammar` (it is lost here). If cancelled:
        close it.
        """

    async def take(self, token: int) -> None:
        """The token came. Call it once for each mask, not for one that ends the answer. If cancelled: close it."""

    def close(self) -> None:
        """Free what belongs to it."""


class Tokenizer(Protocol):
    """A model's tokenizer and chat template. All questions share it."""

    async def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, with the tokenizer's own special tokens (a leading BOS, where it has one).

        Raises Declined `bad-request` when the text takes more time or memory than it gets, ModelError when the
        tokenizer fails, TokenizerLost when its process has gone. If cancelled: the work is ended at once.
        """

    async def chat(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's answer, which may call `tools`.

        Raises what `encode` raises; Declined `bad-request` when the template refuses the turns, ModelError when
        there is no template.
        """

    async def render(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """The text of a conversation whose tokens `chat` gives. Raises what `chat` raises."""

    async def guide(self, kind: str, text: bytes) -> Guide:
        """What leads an answer of this model along a grammar (`protocols/pipe` has the kinds).

        Raises Declined: `bad-grammar` with what is wrong with it, `no-grammar` where grammars can't be used;
        TokenizerLost. If cancelled: nothing is left behind.
        """

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder for the tokens that follow `prompt`; without one, for a text that stands for itself."""

    @property
    def style(self) -> str:
        """In which answers call tools (`tools.py`)."""

    @property
    def lost(self) -> bool:
        """Whether it can't be asked any more."""

    async def aclose(self) -> None:
        """End what belongs to it. What is being asked then raises TokenizerLost."""


class OpenTokenizer(Protocol):
    """How a tokenizer is opened: `process.py`, or `in_process.py` in simulations."""

    async def __call__(self, files: TokenizerFiles) -> Tokenizer:
        """Raises ModelError when the files can't be used, TokenizerLost when its process ended by itself."""
