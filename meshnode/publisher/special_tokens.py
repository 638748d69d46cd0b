"""What a tokenizer calls its special tokens: bos_token, eos_token, pad_token and the others.

They come from the tokenizer's own files, never from the ids of config.json: those are of the model, and some models
have other ones. Chat templates get them by name, as transformers gives them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshnode.core.errors import ModelError

NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# tokens that end a turn; a template that writes them ends the answer with them
_CHAT_ENDS: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")

Settings = Mapping[str, Any]


def special_tokens(settings: Settings, older: Settings, tokenizer: str) -> dict[str, str]:
    """Names and tokens, as transformers reads them. Raises ModelError when tokenizer.json can't be read.

    Args:
      settings: tokenizer_config.json.
      older: special_tokens_map.json, which counts where the former has no `added_tokens_decoder`.
      tokenizer: text of tokenizer.json.
    """
    given = dict(settings)
    if "added_tokens_decoder" not in settings:
        given |= {name: value for name, value in older.items() if value is not None}
    more = given.get("extra_special_tokens")
    if isinstance(more, Mapping):
        given |= more
    found = {name: token for name, value in given.items() if _is_name(name, more) and (token := _content(value))}
    known = _ids_of(tokenizer)
    defaults = _defaults(settings.get("tokenizer_class"))
    return {name: token for name, token in defaults.items() if token in known} | found


def _is_name(name: str, more: Any) -> bool:
    return name.endswith("_token") or (isinstance(more, Mapping) and name in more)


def _content(value: Any) -> str:
    """A token is a text, or a dict with its content and flags."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else ""


def _defaults(name: Any) -> dict[str, str]:
    """What the named class of transformers calls them when the files don't say."""
    import transformers

    found = getattr(transformers, name.removesuffix("Fast"), None) if isinstance(name, str) else None
    if not isinstance(found, type):
        return {}
    parameters = inspect.signature(found).parameters
    return {n: parameters[n].default for n in NAMES if n in parameters and _content(parameters[n].default)}


def end_ids(ids: Sequence[Any], special: Settings, tokenizer: str, template: str | None, vocab: int) -> list[int]:
    """Token ids that end an answer: those of the configurations, of the tokenizer, and the chat template's own.

    Args:
      ids: `eos_token_id` of generation_config.json and config.json: ids, lists of them, or nothing.
      special: from `special_tokens`.
      tokenizer: text of tokenizer.json.
      vocab: tokens that the model can give.

    Raises ModelError when tokenizer.json can't be read.
    """
    known = _ids_of(tokenizer)
    words = [special.get("eos_token")]
    words += [end for end in _CHAT_ENDS if template is not None and end in template]
    found = {known[word] for word in words if word in known}
    for value in ids:
        found |= {i for i in (value if isinstance(value, list) else [value]) if type(i) is int}
    return sorted(i for i in found if 0 <= i < vocab)


def _ids_of(tokenizer: str) -> dict[Any, int]:
    """Added tokens, and the words of the model, which special tokens are of some."""
    try:
        whole = json.loads(tokenizer)
        words = whole["model"].get("vocab", {})
        pairs = words.items() if isinstance(words, dict) else ((word, i) for i, (word, _) in enumerate(words))
        return {**dict(pairs), **{token["content"]: token["id"] for token in whole.get("added_tokens", [])}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"tokenizer.json of the model can't be read: {error}.") from error
