"""What the confinement of an engine costs: the same model in two processes, one of them confined, that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from meshnode.bench.machine import machine
from meshnode.bench.single import Single
from meshnode.publisher.quality import sample_tokens

Json = dict[str, Any]
PROMPT: Final = 64  # tokens
FREE, CONFINED = "free", "confined"
# one round: whatever else the machine does, and gets slower by, meets both sides alike
TURNS: Final = (FREE, CONFINED, CONFINED, FREE, CONFINED, FREE, FREE, CONFINED)
FIGURES: Final = ("decode_tok_s", "decode_cpu_ms", "ttft_ms")


def measure(published: Path, variant: str, *, rounds: int, tokens: int, say: Callable[[str], None]) -> Json:
    """Medians of both sides, and of the ratio (confined to free) within a round.

    Args:
      published: a folder that the publisher wrote.
      tokens: length of each answer.
    """
    text = sample_tokens(published / "tokenizer.json", PROMPT + rounds)
    sides = {FREE: Single(published, variant), CONFINED: Single(published, variant, confined=True)}
    answers: dict[str, list[list[Json]]] = {name: [] for name in sides}  # side -> round -> answers
    try:
        for number in range(rounds):
            for found in answers.values():
                found.append([])
            for name in TURNS:
                answers[name][-1].append(sides[name].generate(text[number : number + PROMPT], tokens))
            speeds = {
                name: statistics.median(a["decode_tok_s"] for a in found[-1]) for name, found in answers.items()
            }
            say(f"round {number + 1}: free {speeds[FREE]:.1f} tok/s, confined {speeds[CONFINED]:.1f}")
    finally:
        for side in sides.values():
            side.stop()
    figures: Json = {}
    for figure in FIGURES:
        of_rounds = {name: _of_rounds(found, figure) for name, found in answers.items()}
        figures |= {f"{name}_{figure}": round(statistics.median(values), 3) for name, values in of_rounds.items()}
        figures[f"{figure}_ratio"] = round(_ratio(of_rounds), 4)
    said = [[a["token_ids"] for turn in found for a in turn] for found in answers.values()]
    return {
        "variant": variant,
        "holds": sides[CONFINED].confined,
        **figures,
        "tokens_equal": said[0] == said[1],
        "rounds": {name: _of_rounds(found, "decode_tok_s") for name, found in answers.items()},
        "machine": machine(),
    }


def _of_rounds(rounds: Sequence[Sequence[Json]], figure: str) -> list[float]:
    """The median of each round."""
    return [statistics.median(answer[figure] for answer in answers) for answers in rounds]


def _ratio(values: Mapping[str, Sequence[float]]) -> float:
    """The median of what the rounds say."""
    return statistics.median(b / a for a, b in zip(values[FREE], values[CONFINED], strict=True))
