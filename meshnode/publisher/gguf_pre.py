"""How the tokenizers of GGUF files split text before they merge: by the name in `tokenizer.ggml.pre`.

A file names the rule and does not contain it. What each name means is a fact of the tokenizers that llama.cpp
converts (src/llama-vocab.cpp names them); the patterns are those of their own tokenizer.json. A name that is not here
is refused: with another rule the model would still talk, but not as it was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from meshnode.core.errors import ModelError

Json = dict[str, Any]

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_HAN: Final = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_WORDS: Final = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _BLANKS
)


@dataclass(frozen=True, slots=True)
class Split:
    """A rule: patterns one after the other, each within the pieces of those before."""

    patterns: tuple[str, ...]
    words: bool = False  # at last the words of GPT-2, which the byte level brings itself
    begin: bool = False  # a text begins with the begin token unless the file says otherwise
    whole: bool = False  # a piece that is a token is that token, whatever its merges
    composed: bool = False  # letters and their accents are one (NFC)

    def normalizer(self) -> Json | None:
        """The field of tokenizer.json."""
        return {"type": "NFC"} if self.composed else None

    def pre_tokenizer(self) -> Json:
        """The field of tokenizer.json."""
        steps: list[Json] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.words})
        return {"type": "Sequence", "pretokenizers": steps}


def _llama3(digits: str) -> str:
    return "|".join((_CONTRACTIONS, _WORDS, digits, _SIGNS, _BLANKS))


def _cased(digits: str, ending: str) -> str:
    return "|".join((*(word + ending for word in _CASED), digits, _CASED_SIGNS, _BLANKS))


_LLAMA3: Final = Split((_llama3(r"\p{N}{1,3}"),), begin=True, whole=True)
_SMAUG: Final = Split((_llama3(r"\p{N}{1,3}"),))
_QWEN2: Final = Split((_llama3(r"\p{N}"),), composed=True)
_DIGITS: Final = Split((r"\p{N}",), words=True)
_GPT2: Final = Split((), words=True)
_DEEPSEEK3: Final = Split((r"\p{N}{1,3}", _HAN, _DEEPSEEK_WORDS))

SPLITS: Final[dict[str, Split]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe", "glm4"), _SMAUG),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "stablelm2": Split((_llama3(r"\p{N}"),)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4", "jais", "trillion"), _GPT2),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": Split(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    **dict.fromkeys(("gpt-4o", "llama4"), Split((_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?"),))),
    "tekken": Split((_cased(r"\p{N}", ""),), begin=True, whole=True),
    "seed-coder": Split(("|".join((_CONTRACTIONS, _WORDS, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _BLANKS)),)),
    "default": Split(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        )
    ),
}


def split_of(pre: object, file: str) -> Split:
    """The rule that a file names. Raises ModelError when it names none, or one that isn't known.

    Args:
      pre: the value of `tokenizer.ggml.pre`, None if there is none.
      file: name of the file, for the sentence.
    """
    if pre is None:
        raise ModelError(
            f"{file} does not say how its tokenizer splits text (tokenizer.ggml.pre is missing, as in files of "
            "before May 2024). Get a newer file of this model, or give its Hugging Face folder."
        )
    if not isinstance(pre, str) or pre not in SPLITS:
        raise ModelError(
            f"{file} splits text by the rule {str(pre)[:40]!r} (tokenizer.ggml.pre), which is not known here; "
            f"another rule would spoil its answers. Known are {', '.join(sorted(SPLITS))}. "
            "Give the Hugging Face folder of this model instead."
        )
    return SPLITS[pre]
