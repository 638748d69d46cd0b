"""The tokenizer of a GGUF file as a tokenizer.json: words, merges or scores, special tokens, splitting.

Made of the file's metadata alone, by the meaning that each key has in ggml's specification (docs/gguf.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshnode.core.errors import ModelError
from meshnode.publisher.gguf_pre import split_of

Json = dict[str, Any]
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # token types
_BLANK: Final = "▁"
# names of templates and of special_tokens_map.json -> metadata
SPECIAL: Final = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # so the specification spells it
    "pad_token": "padding",
    "mask_token": "mask",
}
_ENDS: Final = ("eos", "eot", "eom")  # end of text, of a turn, of a message
# Phi-3 takes the blanks after these away; the file can't say so
_GREEDY_BUT: Final = frozenset(("<unk>", "<s>", "<|endoftext|>"))


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What the metadata say about text."""

    tokenizer: str  # tokenizer.json
    special: dict[str, str]  # bos_token, eos_token, ...
    ends: tuple[int, ...]  # ids that end an answer


def gguf_tokenizer(metadata: Mapping[str, Any], file: str) -> GgufTokenizer:
    """Make the tokenizer of a file.

    Args:
      metadata: of the file, by their full names.
      file: its name, for sentences.

    Raises ModelError when the tokenizer is incomplete, of an unknown kind, or splits by an unknown rule.
    """
    return _Reader(metadata, file).read()


class _Reader:
    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self._metadata = metadata
        self._file = file
        self._words = self._list("tokens", str)
        if not self._words:
            raise ModelError(f"{file} carries no tokenizer.")
        self._types = self._list("token_type", int) or [_NORMAL] * len(self._words)
        self._ids = {word: number for number, word in enumerate(self._words)}
        if len(self._types) != len(self._words) or len(self._ids) != len(self._words):
            raise ModelError(f"the tokenizer in {file} has words twice, or not a type for each; the file is damaged.")

    def read(self) -> GgufTokenizer:
        kind = self._metadata.get("tokenizer.ggml.model")
        match kind:
            case "gpt2":
                fields = self._byte_level()
            case "llama":
                fields = self._scored()
            case _:
                raise ModelError(
                    f"{self._file} has a tokenizer of the kind {str(kind)[:40]!r}; gpt2 and llama are read. "
                    "Give the Hugging Face folder of this model instead."
                )
        whole: Json = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": self._added(), **fields}
        special = {name: self._words[i] for name, key in SPECIAL.items() if (i := self._id(key)) is not None}
        ends = tuple(sorted({i for key in _ENDS if (i := self._id(key)) is not None}))
        return GgufTokenizer(json.dumps(whole, ensure_ascii=False), special, ends)

    # ------------------------------------------------------------ the two kinds

    def _byte_level(self) -> Json:
        """Byte-level BPE with a list of merges: GPT-2, Llama 3, Qwen."""
        split = split_of(self._metadata.get("tokenizer.ggml.pre"), self._file)
        merges = [self._merge(merge) for merge in self._list("merges", str)]
        return {
            "normalizer": split.normalizer(),
            "pre_tokenizer": split.pre_tokenizer(),
            "post_processor": self._ends_of_text(begin=split.begin),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": split.whole,
                "vocab": self._vocabulary(),
                "merges": merges,
            },
        }

    def _merge(self, merge: str) -> tuple[str, str]:
        """ "a b" """
        first, blank, second = merge.partition(" ")
        if not blank or any(part not in self._ids for part in (first, second, first + second)):
            raise ModelError(
                f"the tokenizer in {self._file} merges {merge[:60]!r}, which are not words of it; "
                "the file is damaged."
            )
        return first, second

    def _scored(self) -> Json:
        """SentencePiece: the two neighbours whose word has the highest score become one; the unknown is bytes."""
        scores = [float(score) for score in self._list("scores", (int, float))]
        if len(scores) != len(self._words) or not all(map(math.isfinite, scores)):
            raise ModelError(f"the tokenizer in {self._file} has no score for each word; the file is damaged.")
        unknown = self._id("unknown")
        prefix = self._flag("add_space_prefix", default=True)
        before: list[Json] = [{"type": "Prepend", "prepend": _BLANK}] if prefix else []
        after: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
        blanks = {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "}
        decoders = [blanks, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*before, replaced]},
            "pre_tokenizer": None,
            "post_processor": self._ends_of_text(begin=True),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None if unknown is None else self._words[unknown],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": self._vocabulary(),
                "merges": self._merges_of(scores),
            },
        }

    def _merges_of(self, scores: Sequence[float]) -> list[tuple[str, str]]:
        """All the ways to put a word together of two, the word with the highest score first."""
        known = {word: i for word, i in self._ids.items() if self._types[i] == _NORMAL}
        ways = [
            (-scores[i], known[word[:cut]], known[word[cut:]], word[:cut], word[cut:])
            for word, i in known.items()
            for cut in range(1, len(word))
            if word[:cut] in known and word[cut:] in known
        ]
        return [(first, second) for _, _, _, first, second in sorted(ways)]

    # ------------------------------------------------------------ what both have

    def _vocabulary(self) -> dict[str, int]:
        """Words that text is made of, and the unknown; what is unused is none of them."""
        return {word: i for word, i in self._ids.items() if self._types[i] != _UNUSED}

    def _added(self) -> list[Json]:
        """Words that are found in a text before it is split: special ones, and those that somebody added."""
        greedy = self._metadata.get("general.architecture") == "phi3"
        return [
            {
                "id": number,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": greedy and self._types[number] == _CONTROL and word not in _GREEDY_BUT,
                "normalized": False,
                "special": self._types[number] != _USER,
            }
            for number, word in enumerate(self._words)
            if self._types[number] in (_CONTROL, _USER, _UNKNOWN) and word
        ]

    def _ends_of_text(self, *, begin: bool) -> Json:
        """With which tokens a text begins and ends. `begin`: what holds when the file doesn't say."""
        sides = [
            self._id(key) if self._flag(f"add_{key}_token", default=default) else None
            for key, default in (("bos", begin), ("eos", False))
        ]
        used = {self._words[i]: i for i in sides if i is not None}
        first, last = ([] if i is None else [self._words[i]] for i in sides)

        def template(*sequences: tuple[str, int]) -> list[Json]:
            out: list[Json] = []
            for name, kind in sequences:
                out += [{"SpecialToken": {"id": word, "type_id": kind}} for word in first]
                out.append({"Sequence": {"id": name, "type_id": kind}})
                out += [{"SpecialToken": {"id": word, "type_id": kind}} for word in last]
            return out

        return {
            "type": "TemplateProcessing",
            "single": template(("A", 0)),
            "pair": template(("A", 0), ("B", 1)),
            "special_tokens": {word: {"id": word, "ids": [i], "tokens": [word]} for word, i in used.items()},
        }

    def _list(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ModelError(f"{self._file} has no usable tokenizer.ggml.{key}; the file is damaged.")
        return value

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._file} has no usable tokenizer.ggml.{key}; the file is damaged.")
        return value

    def _id(self, key: str) -> int | None:
        """Id of a special token; None when the file names none. Raises ModelError for one that isn't there."""
        value = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None and key == "seperator":
            value = self._metadata.get("tokenizer.ggml.separator_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self._words):
            raise ModelError(f"{self._file} has the {key} token {value}, beyond its {len(self._words)} tokens.")
        return value
