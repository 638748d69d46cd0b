"""A model's tokenizer and chat template, without transformers. Runs in the tokenizer's process (`child.py`).

Both come with the model, from whoever published it: a template is a program, a tokenizer.json holds regular
expressions, and the library that reads it ends a process by panicking. Nothing here is for the node itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import jinja2
from tokenizers import Tokenizer as FastTokenizer

from meshnode.core.errors import Declined, ModelError
from meshnode.text.grammar import Grammars, Walk
from meshnode.text.limits import Limits
from meshnode.text.template import compile_template, variables_of
from meshnode.text.tools import HERMES, MARKERS, Tool, style_of, told
from meshnode.text.vocabulary import MAX_WORDS, Vocabulary

Turn = Mapping[str, Any]

_HARMLESS: Final = (
    "{% for m in messages %}{{ m['role'] + m.content | trim }}{% if not loop.last %}, {% endif %}{% endfor %}"
)


class ModelText:
    """Turns chat turns or plain text into token ids."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._fast: Any = None
        self.style = HERMES  # in which tools are called
        self._knows_tools = False
        self._grammars: Grammars | None = None
        self._variables: dict[str, Any] = {}
        self._template: jinja2.Template | None = None
        self._harmless = compile_template(_HARMLESS)

    def read_tokenizer(self, tokenizer: bytes, specials: bytes | None) -> None:
        """Read tokenizer.json and special_tokens_map.json. Raises ModelError when they can't be used."""
        try:
            self._fast = FastTokenizer.from_buffer(tokenizer)
            self._fast.no_truncation()
            self._fast.no_padding()
        except BaseException as error:
            raise ModelError(f"the model's tokenizer can't be read: {_words_of(error)}") from error
        if specials is not None:
            self._variables = _special_tokens(specials)

    def read_grammars(self, tokenizer: bytes, vocab: int, eos: Sequence[int]) -> None:
        """Make ready for `guide`. Raises ModelError when the words can't be used for that."""
        self._grammars = Grammars(tokenizer, vocab, eos)

    def read_template(self, template: bytes | None) -> None:
        """Raises ModelError for a text that is no template."""
        if template is None:
            return
        try:
            self._template = compile_template(template.decode())
            self.style = style_of(template.decode())
            self._knows_tools = "tools" in variables_of(template.decode())
        except Exception as error:
            raise ModelError(
                f"the model's chat template can't be read: {_words_of(error)}; publish the model again"
            ) from error

    def warm_up(self) -> None:
        """Take the ways that a question takes, without anything that could run wild."""
        "".join(self._harmless.generate(messages=[{"role": "user", "content": "a"}]))
        with suppress(ModelError):
            self._tokens("a b", add_special_tokens=False)

    def decoder(self) -> dict[str, Any] | None:
        """The field `decoder` of tokenizer.json."""
        if self._fast.decoder is None:
            return None
        settings: dict[str, Any] = json.loads(self._fast.decoder.__getstate__())
        return settings

    def vocabulary(self, size: int) -> Vocabulary:
        """What the first `size` token ids stand for in an answer. Raises ModelError beyond its limits."""
        special = {token.content for token in self._fast.get_added_tokens_decoder().values() if token.special}
        words = map(self._fast.id_to_token, range(min(size, MAX_WORDS)))
        special -= MARKERS
        return Vocabulary(None if word in special else word for word in words)

    def encode(self, text: str) -> Sequence[int]:
        """See `port.Tokenizer.encode`."""
        return self._tokens(text, add_special_tokens=True)

    def chat(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> Sequence[int]:
        """See `port.Tokenizer.chat`."""
        return self._tokens(self.render(turns, tools), add_special_tokens=False)

    def render(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """See `port.Tokenizer.render`."""
        if self._template is None:
            raise ModelError("this model has no chat template; ask with plain text (--raw)")
        variables: dict[str, Any] = {**self._variables, "messages": [dict(turn) for turn in turns]}
        if not self._knows_tools and (tools or any("tool_calls" in turn for turn in turns)):
            variables["messages"], tools = told(turns, tools), ()
        variables |= {"tools": list(tools) or None, "documents": None}  # defined, as transformers has them
        return self._rendered(lambda template: template.generate(add_generation_prompt=True, **variables))

    @property
    def for_grammars(self) -> bool:
        """Whether `guide` can be used."""
        return self._grammars is not None

    def guide(self, kind: str, text: str) -> Walk:
        """The beginning of an answer along a grammar. Raises Declined `bad-grammar`."""
        if self._grammars is None:
            raise ModelError("the tokenizer was opened without grammars")
        return self._grammars.begin(kind, text)

    def _rendered(self, generate: Callable[[jinja2.Template], Any]) -> str:
        assert self._template is not None
        parts, size = [], 0
        try:
            for part in generate(self._template):
                parts.append(part)
                size += len(part)
                if size > self._limits.text_characters:
                    raise Declined(
                        "bad-request",
                        f"the model's chat template makes more than {self._limits.text_characters} characters "
                        "of these turns",
                    )
        except Declined:
            raise
        except jinja2.TemplateError as error:
            raise Declined(
                "bad-request", f"the model's chat template refuses these turns: {_words_of(error)}"
            ) from error
        except MemoryError as error:
            raise Declined(
                "bad-request",
                f"the model's chat template wants more than {self._limits.bytes >> 20} MiB of memory for these turns",
            ) from error
        except Exception as error:
            raise Declined(
                "bad-request",
                f"the model's chat template failed on these turns: {type(error).__name__}: {_words_of(error)}",
            ) from error
        return "".join(parts)

    def _tokens(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        try:
            ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            raise ModelError(f"the model's tokenizer failed on this text: {_words_of(error)}") from error
        if len(ids) > self._limits.tokens:
            raise Declined(
                "too-long", f"the text makes {len(ids)} tokens; {self._limits.tokens} are possible in any model"
            )
        return ids


def _special_tokens(data: bytes) -> dict[str, Any]:
    """special_tokens_map.json: names to tokens, or lists of them. Raises ModelError."""
    try:
        given = json.loads(data)
        named = {str(name): value for name, value in given.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"special_tokens_map.json of the model can't be read: {_words_of(error)}") from error
    return {name: value for name, value in named.items() if isinstance(value, (str, list))}


def _words_of(error: BaseException) -> str:
    """What a library says, short enough for one sentence."""
    words = " ".join(str(error).split())
    return words[:300] or type(error).__name__
