"""A model's tokenizer and chat template, without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from meshnode.core.errors import Declined, ModelError
from meshnode.text.template import compile_template


class Tokenizer:
    """Turns chat turns or plain text into token ids."""

    def __init__(
        self, tokenizer_json: Path, chat_template: str | None, *, bos_ids: Sequence[int], eos_ids: Sequence[int]
    ) -> None:
        """`bos_ids`, `eos_ids`: of the architecture; templates call the first ones bos_token and eos_token.

        Raises ModelError when a file can't be read.
        """
        try:
            self._fast = FastTokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"the model's tokenizer {tokenizer_json} can't be read: {error}") from error
        self._special = {
            name: self._fast.id_to_token(ids[0]) or ""
            for name, ids in (("bos_token", bos_ids), ("eos_token", eos_ids))
            if ids
        }
        self._template: jinja2.Template | None = None
        if chat_template is not None:
            try:
                self._template = compile_template(chat_template)
            except jinja2.TemplateError as error:
                raise ModelError(f"the model's chat template can't be read: {error}") from error

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, with the tokenizer's own special tokens (a leading BOS, where it has one)."""
        return tuple(self._fast.encode(text).ids)

    def chat(self, turns: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's answer.

        Raises Declined `bad-request` when the template refuses the turns, ModelError when there is no template.
        """
        if self._template is None:
            raise ModelError("this model has no chat template; ask with plain text (--raw)")
        variables: dict[str, Any] = {**self._special, "messages": [dict(turn) for turn in turns]}
        variables |= {"tools": None, "documents": None}  # defined, as transformers has them
        try:
            text = self._template.render(add_generation_prompt=True, **variables)
        except jinja2.TemplateError as error:
            raise Declined("bad-request", f"the model's chat template refuses these turns: {error}") from error
        except Exception as error:  # the border: a template is a program of the model's publisher
            raise Declined(
                "bad-request", f"the model's chat template failed on these turns: {type(error).__name__}: {error}"
            ) from error
        return tuple(self._fast.encode(text, add_special_tokens=False).ids)

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A decoder for the answer to `prompt`."""
        return TextStream(self._fast, prompt)


class TextStream:
    """Tokens in, text out as soon as it is certain (a character may need several tokens)."""

    def __init__(self, fast: FastTokenizer, prompt: Sequence[int]) -> None:
        self._fast = fast
        # The last prompt tokens are context: whether a piece begins with a space depends on what precedes it.
        self._stream = DecodeStream(ids=list(prompt[-8:]), skip_special_tokens=True)

    def feed(self, token: int) -> str:
        """Text that this token completes; often empty for non-Latin scripts."""
        return self._stream.step(self._fast, token) or ""
