"""The gate: a model is published when its float32 graph says what transformers says, and refused otherwise.

Both sides run the same text, transformers from its own reading of the checkpoint (`reference.py`), our graph in the
stages that engines cut (`stages.py`), each with the weights of one layer at a time. Compared are the logits of every
token. The text is longer than every sliding window of the model; where a window is so long that the whole model over
such a text would take minutes, one layer of each kind is run over it, and the whole model over a shorter one.

A mixture of experts is another matter: where two experts are as good as equal for a token, float32 sums in another
order choose the other one, and all that follows is different without being wrong. There each of our layers gets what
transformers' layer gets, and one token in thirty may differ.

Runs in the publisher only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.publisher.calibrate import Importance, ImportanceMeter
from meshnode.publisher.expression import Array
from meshnode.publisher.original import Traits
from meshnode.publisher.quality import perplexity_milli
from meshnode.publisher.reference import Reference
from meshnode.publisher.stages import Stages

# Relative to the standard deviation of the logits, in the worst of all logits. Graphs that are right stay below a
# twentieth of it (float32 sums in another order), the smallest mistake that was ever seen was ten times as large.
BOUND: Final = 1e-3
LAYER_BOUND: Final = 1e-3  # root mean square of a layer's difference, relative to its output: for the message
# Root mean square of the difference of one layer on the same input, relative to what it adds to the worst token:
# right ones differ by 1e-6, a forgotten window makes 5e-4 with random weights.
FAR_BOUND: Final = 1e-4
TIES: Final = 1 / 30  # tokens of a layer of experts that may have chosen another one
_BEYOND: Final = 8  # the text is longer than a window by this part of it


@dataclass(frozen=True, slots=True)
class Passed:
    """What the gate found out about a model that it let through."""

    importance: Importance
    reference_milli: int  # perplexity of the checkpoint in transformers, in thousandths
    difference: float  # largest difference of a logit
    spread: float  # standard deviation of the logits
    agreed: int  # tokens whose most likely successor is the same
    logits: Array  # of transformers, float32 [tokens, vocabulary]


@dataclass(slots=True)
class _Comparison:
    """Both sides, layer by layer."""

    tokens: list[int]
    stages: Stages
    tick: Callable[[int], None]
    experts: bool  # each layer gets what transformers' gets, and is judged by itself
    hidden: Array = field(init=False)  # our side's, between two layers
    odd_layer: tuple[int, float] | None = None  # the first one that deviates, and by how much of its output
    result: tuple[Array, Array] | None = None  # logits of transformers and ours

    def __post_init__(self) -> None:
        self.hidden = np.array(self.tokens, np.int64)

    def layer(self, index: int, given: Array, theirs: Array) -> None:
        self.hidden = self.stages.layer(index, self.hidden)
        off = _relative(self.hidden, theirs[0])
        odd = not off <= LAYER_BOUND
        if self.experts:
            odd = not (_added(self.hidden, given[0], theirs[0]) <= LAYER_BOUND).mean() >= 1 - TIES
            self.hidden = theirs[0]
        if odd and self.odd_layer is None:
            self.odd_layer = index, off
        self.tick(index + 1)

    def logits(self, theirs: Array) -> None:
        self.result = theirs, self.stages.head(self.hidden)


def examine(
    reference: Reference,
    stages: Stages,
    traits: Traits,
    tokens: list[int],
    calibration: list[int],
    context: int,
    tick: Callable[[int], None] = lambda done: None,
) -> Passed:
    """Let a model through, or refuse it.

    Args:
      stages: of its float32 graph.
      tokens: the text that is compared; its perplexity becomes the reference of all variants.
      calibration: a text that shows which inputs of the matrices matter.
      context: positions that the model is published for.
      tick: told the number of layers that are done.

    Raises:
      ModelError: the graph says something else than transformers, with the figures.
    """
    family = str(traits.config.model_type)
    meter = ImportanceMeter(row=1, rows=len(calibration))
    comparison = _Comparison(tokens, stages, tick, traits.experts)
    rows = _rows(tokens, calibration)
    reference.run(rows, on_layer=comparison.layer, on_linear=meter.look, on_logits=comparison.logits)
    assert comparison.result is not None
    theirs, ours = comparison.result
    spread = float(theirs.std())
    per_token = np.abs(ours - theirs).max(axis=1)
    agreed = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    right = bool(np.all(per_token <= BOUND * spread))  # a logit that is no number is a difference, too
    if not right or (traits.experts and comparison.odd_layer is not None):
        raise ModelError(_refusal(family, comparison, per_token, agreed, reference.unused))
    _far_layers(reference, stages, traits, tokens, context)
    return Passed(
        importance=meter.importance(tied=not reference.has_own_head),
        reference_milli=perplexity_milli(theirs, tokens),
        difference=float(per_token.max()),
        spread=spread,
        agreed=agreed,
        logits=theirs,
    )


def _rows(tokens: list[int], calibration: list[int]) -> list[list[int]]:
    """Two texts of one length: what follows a text changes nothing in it."""
    length = max(len(tokens), len(calibration))
    return [text + [text[0]] * (length - len(text)) for text in (tokens, calibration or tokens)]


def _far_layers(reference: Reference, stages: Stages, traits: Traits, tokens: list[int], context: int) -> None:
    """Compare one layer of each kind whose window is longer than the text. Raises ModelError."""
    done: set[tuple[int, int]] = set()
    for index, layer in enumerate(traits.layers):
        window, kind = layer.window, (layer.window or 0, id(layer.rotation))
        if window is None or window < len(tokens) - 1 or window >= context or kind in done:
            continue
        done.add(kind)
        length = min(window + max(64, window // _BEYOND), context)
        text = (tokens * -(-length // len(tokens)))[:length]
        seen: list[Array] = []
        reference.run([text], on_layer=lambda _, *hidden, seen=seen: seen.extend(hidden), only=(index,))
        given, theirs = (hidden[0] for hidden in seen)
        ours = stages.layer(index, given if index else np.array(text, np.int64))
        each = _added(ours, given, theirs)
        off = float(np.quantile(each, 1 - TIES) if traits.experts else each.max())
        if not off <= FAR_BOUND:
            raise ModelError(
                f"This model is not published: on a text of {length} tokens, which is longer than its sliding window "
                f"of {window}, layer {index} of our graph deviates from transformers by {off:.2g} of what it adds to "
                f"a token (at most {FAR_BOUND:g} is let through). Models of the architecture "
                f"{traits.config.model_type!r} with such a window are not supported yet."
            )


def _added(ours: Array, given: Array, theirs: Array) -> Array:
    """Difference of each token, relative to what a layer adds to it. Root mean squares."""
    added = np.sqrt(np.square(theirs - given).mean(axis=1))
    return np.asarray(np.sqrt(np.square(ours - theirs).mean(axis=1)) / np.maximum(added, 1e-30))


def _relative(ours: Array, theirs: Array) -> float:
    return float(np.sqrt(np.square(ours - theirs).mean()) / max(float(np.sqrt(np.square(theirs).mean())), 1e-30))


def _refusal(family: str, comparison: _Comparison, per_token: Array, agreed: int, unused: list[str]) -> str:
    assert comparison.result is not None
    theirs, _ours = comparison.result
    finite = np.where(np.isfinite(per_token), per_token, np.inf)
    spread = float(theirs.std())
    if comparison.experts and comparison.odd_layer is not None:
        index, off = comparison.odd_layer
        return (
            f"This model is not published, because our graph does not say what transformers says: on a text of "
            f"{len(per_token)} tokens layer {index} deviates by {off:.2g} of its output, for more tokens than could "
            f"have chosen another expert by chance. Models of the architecture {family!r} with these settings are "
            "not supported yet."
        )
    at = int(np.argmax(finite > BOUND * spread))
    where = "the head deviates first"
    if comparison.odd_layer is not None:
        where = f"layer {comparison.odd_layer[0]} deviates first, by {comparison.odd_layer[1]:.2g} of its output"
    more = ""
    if unused:
        more = f" In the checkpoint are {len(unused)} weights that transformers doesn't use, {unused[0]} among them."
    return (
        f"This model is not published, because our graph does not say what transformers says: on a text of "
        f"{len(per_token)} tokens the logits differ by up to {finite.max():.3g} (their standard deviation is "
        f"{spread:.3g}; at most {BOUND * spread:.2g} is let through), first at token {at}; {where}; "
        f"{agreed} of {len(per_token)} most likely tokens are the same. Models of the architecture {family!r} with "
        f"these settings are not supported yet.{more}"
    )
