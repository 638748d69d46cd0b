"""Which tokens may follow, so that a text has a form. Runs in the tokenizer's process (`child.py`).

Grammars come from whoever asks; llguidance compiles them and walks with the answer, one token after the other.
Source: llguidance 1.9 (Earley parser over derivatives of regular expressions), github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from meshnode.core.errors import Declined, ModelError
from meshnode.text.forms import BETWEEN, JSON_SCHEMA, KINDS
from meshnode.text.port import BAD_GRAMMAR

MAX_SENTENCE: Final = 300  # characters of what the library says

_NOWHERE: Final = "NoExtension"  # in what the library says when nothing can follow


class Grammars:
    """The words of one tokenizer, as grammars need them."""

    def __init__(self, tokenizer: bytes, vocab: int, eos: Sequence[int]) -> None:
        """Raises ModelError when the words can't be read.

        Args:
          tokenizer: tokenizer.json.
          vocab: tokens that the model can give.
          eos: tokens that end an answer.
        """
        import llguidance  # 8 MB that only a process needs in which grammars are walked

        self._library: Any = llguidance
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        try:
            self._words = llguidance.LLTokenizer(tokenizer.decode(), n_vocab=vocab, eos_token=list(eos))
        except BaseException as error:
            raise ModelError(f"the model's tokenizer can't be used for grammars: {_short(str(error))}") from error

    def begin(self, kind: str, text: str) -> Walk:
        """The beginning of an answer. Raises Declined `bad-grammar` with what is wrong."""
        return Walk(self._compiled(kind, text))

    def _compiled(self, kind: str, text: str) -> Any:
        matcher = self._library.LLMatcher
        try:
            match kind:
                case "json_schema" | "json_object":
                    schema = json.loads(text) if kind == JSON_SCHEMA else {"type": "object"}
                    options = {"whitespace_pattern": BETWEEN, "whitespace_flexible": True}
                    grammar = matcher.grammar_from_json_schema(schema, overrides=options)
                case "regex":
                    grammar = matcher.grammar_from_regex(text)
                case "lark":
                    grammar = matcher.grammar_from_lark(text)
                case _:
                    raise Declined(
                        BAD_GRAMMAR, f"there is no grammar of the kind {kind!r}; kinds are {', '.join(KINDS)}"
                    )
            walk = matcher(self._words, grammar, log_level=0, limits=self._limits)
        except Declined:
            raise
        except (ValueError, RecursionError, TypeError) as error:
            raise Declined(BAD_GRAMMAR, f"the {kind} is no JSON: {_short(str(error))}") from error
        except MemoryError:
            raise
        except BaseException as error:  # the library ends a call by panicking
            raise Declined(BAD_GRAMMAR, f"the {kind} can't be used: {_short(str(error))}") from error
        _check(walk, f"the {kind} can't be used")
        return walk


class Walk:
    """One answer on its way."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self) -> bytes:
        """Which tokens may follow: a bit for each, the lowest bit of the first byte for token 0.

        Tokens that end the answer are among them only where the text may end. Raises Declined `bad-grammar` when
        finding it out takes more than the library's limits.
        """
        mask: bytes = self._matcher.compute_bitmask()
        _check(self._matcher, "the grammar can't be followed")
        if not any(mask):
            raise Declined(BAD_GRAMMAR, "the grammar allows a text that this model has no tokens for")
        return mask

    def take(self, token: int) -> None:
        """A token of the mask has come. Raises Declined `bad-grammar` for another one."""
        self._matcher.consume_token(token)
        _check(self._matcher, f"the token {token} leads out of the grammar")


def _check(matcher: Any, what: str) -> None:
    if matcher.is_error():
        why = matcher.get_error()
        raise Declined(BAD_GRAMMAR, f"{what}: {'no text fits it' if _NOWHERE in why else _short(why)}")


def _short(words: str) -> str:
    return " ".join(words.split())[:MAX_SENTENCE]
