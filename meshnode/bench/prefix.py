"""How much sooner the second turn of a long chat starts when the stages have kept the first one.

Two meshes answer the same questions in turns: one keeps prompts, the other one does not. Their tokens have to agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from meshnode.api.messages import Answer
from meshnode.bench.machine import machine
from meshnode.harness.mesh import Mesh
from meshnode.publisher.quality import calibration_tokens, sample_tokens

Json = dict[str, Any]
KEEPS, FORGETS = "with", "without"
HISTORY: Final = 1500  # tokens of the first turn and its answer
NEW: Final = 32  # of the second question
_SHIFT: Final = 8  # each round has a text of its own: it begins so many tokens later


def measure(
    meshes: dict[str, Mesh], published: Path, *, rounds: int, tokens: int, say: Callable[[str], None]
) -> Json:
    """Run the benchmark on two meshes that are ready; its figures.

    Args:
      meshes: `KEEPS` and `FORGETS`.
      published: the folder of the model that both serve.
      tokens: length of each answer.
    """
    tokenizer = published / "tokenizer.json"
    text = sample_tokens(tokenizer, HISTORY) + calibration_tokens(tokenizer, HISTORY)
    found: dict[str, list[float]] = {KEEPS: [], FORGETS: []}
    kept: list[int] = []
    lengths: list[int] = []
    equal = True
    for number in range(rounds):
        own = [text[(number * _SHIFT + i) % len(text)] for i in range(HISTORY + NEW)]
        first = own[: HISTORY - tokens]
        answers = {side: _ask(mesh, first, tokens) for side, mesh in meshes.items()}
        equal = equal and answers[KEEPS].token_ids == answers[FORGETS].token_ids
        second = [*first, *answers[KEEPS].token_ids, *own[HISTORY:]]
        # who goes first takes turns, too
        for side in (KEEPS, FORGETS) if number % 2 else (FORGETS, KEEPS):
            answers[side] = _ask(meshes[side], second, tokens)
            found[side].append(answers[side].receipt.ttft_ms)
        equal = equal and answers[KEEPS].token_ids == answers[FORGETS].token_ids
        assert answers[FORGETS].receipt.cached_tokens == 0, "the mesh that forgets has kept a prompt"
        kept.append(answers[KEEPS].receipt.cached_tokens)
        lengths.append(len(second))
        say(
            f"round {number + 1}: first token after {found[KEEPS][-1]:.0f} ms with {kept[-1]} of {lengths[-1]} "
            f"tokens kept, {found[FORGETS][-1]:.0f} ms without"
        )
    return {
        "nodes": len(meshes[KEEPS].serving),
        "prompt_tokens": round(statistics.median(lengths)),
        "kept_tokens": round(statistics.median(kept)),
        **{f"{side}_ttft_ms": round(statistics.median(times), 1) for side, times in found.items()},
        "sooner": round(statistics.median(b / a for a, b in zip(found[KEEPS], found[FORGETS], strict=True)), 2),
        "tokens_equal": equal,
        "rounds": {**found, "kept": kept},
        "machine": machine(),
    }


def _ask(mesh: Mesh, prompt: Sequence[int], tokens: int) -> Answer:
    return mesh.serving[0].client.generate(prompt, max_tokens=tokens, temperature=0)
