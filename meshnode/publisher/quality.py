"""How good a variant is: perplexity on a fixed text, beside the float32 checkpoint in transformers.

The text is the introduction of Charles Darwin's "On the Origin of Species" (1859, public domain). Its perplexity
says nothing about how clever a model is; the distance between a variant and the reference says what the variant
has lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.publisher.expression import Array
from meshnode.publisher.model_text import tokens_of
from meshnode.publisher.stages import GroupFiles, Stages

TEXT_NAME: Final = "origin-of-species-1859-introduction"
MOST_TOKENS: Final = 768
FEWEST_TOKENS: Final = 192
_WORK: Final = 10**12  # weights times tokens
_LOGITS: Final = 1 << 26  # float32 values that are held at a time
_MOST_LOSS: Final = 30.0  # natural logarithm of the largest perplexity that is told apart
_QUALITY_FILE: Final = "quality_text.txt"
_CALIBRATION_FILE: Final = "calibration_text.txt"  # our own; must share nothing with the text that is measured


def text_length(weights: int, vocabulary: int, context: int) -> int:
    """How many tokens of the texts are looked at, so that a large model takes minutes and not hours."""
    by_work = max(FEWEST_TOKENS, _WORK // max(weights, 1))
    by_logits = max(FEWEST_TOKENS, _LOGITS // max(vocabulary, 1))
    return min(MOST_TOKENS, by_work, by_logits, context)


def sample_tokens(tokenizer: Path, most: int) -> list[int]:
    """Token ids of the fixed text, at most `MOST_TOKENS` and `most`."""
    return _tokens(_QUALITY_FILE, tokenizer, most)


def calibration_tokens(tokenizer: Path, most: int) -> list[int]:
    """Token ids of the mixed text that shows which inputs matter."""
    return _tokens(_CALIBRATION_FILE, tokenizer, most)


def _tokens(name: str, tokenizer: Path, most: int) -> list[int]:
    text = files("meshnode.publisher").joinpath(name).read_text(encoding="utf-8")
    return list(tokens_of(text, tokenizer)[: min(MOST_TOKENS, most)])


def perplexity_milli(logits: Array, tokens: list[int]) -> int:
    """exp(mean negative log likelihood of the next token) * 1000. `logits` is [rows, vocabulary]."""
    likelihood = np.empty(len(tokens) - 1)
    for at, following in enumerate(tokens[1:]):  # a token at a time: logits are large, in float64 twice as much
        row = np.asarray(logits[at], np.float64)
        peak = row.max()
        likelihood[at] = row[following] - peak - np.log(np.exp(row - peak).sum())
    return round(float(np.exp(min(-likelihood.mean(), _MOST_LOSS))) * 1000)


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant beside the checkpoint in transformers."""

    perplexity_milli: int
    deviation: float  # root mean square of the difference of the logits, relative to their standard deviation


def measure_variant(folder: Path, variant: dict[str, Any], tokens: list[int], reference: Array) -> Measured:
    """Look at one variant, from its published files, a layer at a time.

    Args:
      variant: its entry in index.json.
      reference: what transformers says, float32 [tokens, vocabulary].
    """
    stages = Stages(folder / variant["graph"]["path"], len(variant["layers"]), GroupFiles(folder, variant))
    logits = stages.run(tokens)
    return Measured(perplexity_milli(logits, tokens), deviation(logits, reference))


def deviation(logits: Array, reference: Array) -> float:
    """Root mean square of the difference, relative to the standard deviation of the reference."""
    square = float(np.mean([np.square(a - b).mean() for a, b in zip(logits, reference, strict=True)]))
    return float(square**0.5 / max(float(reference.std()), 1e-30))
