"""How fast a mesh answers, beside the same variant in one process. Both take turns within one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from meshnode.api.messages import Answer
from meshnode.bench.machine import machine
from meshnode.bench.single import Single
from meshnode.harness.mesh import Mesh
from meshnode.harness.receipt import node_line
from meshnode.publisher.quality import sample_tokens

Json = dict[str, Any]
SHORT: Final = 32  # tokens of a short prompt
LONG: Final = 512
SESSIONS: Final = 4


@dataclass(slots=True)
class Figures:
    """Every measurement of every round; times in milliseconds, rates in tokens per second."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values), 2) for name, values in self.values.items()}


def measure(
    mesh: Mesh, published: Path, variant: str, *, rounds: int, tokens: int, say: Callable[[str], None]
) -> Json:
    """Run the benchmark on a mesh that is ready; its figures.

    Args:
      published: the folder of the model that the mesh serves.
      tokens: length of each answer.
    """
    text = sample_tokens(published / "tokenizer.json", LONG + rounds * 8)
    single = Single(published, variant)
    figures = Figures()
    equal = True
    hops: list[Json] = []
    try:
        for number in range(rounds):
            short, long = text[number * 8 :][:SHORT], text[number * 8 :][:LONG]
            mine = _ask(mesh, short, tokens)
            alone = single.generate(short, len(mine.token_ids))
            speed = mine.receipt.decode_tok_s or 0.0
            equal = equal and list(mine.token_ids) == alone["token_ids"]
            hops.append({key: mine.as_json()[key] for key in ("hops", "return_ms")})
            figures.add("mesh_tok_s", speed)
            figures.add("single_tok_s", alone["decode_tok_s"])
            figures.add("ratio", speed / alone["decode_tok_s"])
            for name, prompt in (("32", short), ("512", long)):
                figures.add(f"mesh_ttft_ms_{name}", _ask(mesh, prompt, 1).receipt.ttft_ms)
                figures.add(f"single_ttft_ms_{name}", single.generate(prompt, 1)["ttft_ms"])
            together = _together(mesh, [text[number * 8 + k :][:SHORT] for k in range(SESSIONS)], tokens)
            figures.add("mesh_concurrent4_tok_s", together)
            figures.add("concurrent4_gain", together / speed)
            say(
                f"round {number + 1}: mesh {speed:.1f} tok/s, one process "
                f"{alone['decode_tok_s']:.1f}, {SESSIONS} sessions {together:.1f}"
            )
    finally:
        single.stop()
    nodes = [node_line(member) for member in mesh.serving]
    medians = figures.medians()
    return {
        "variant": variant,
        "nodes": len(nodes),
        **medians,
        "mesh_prefill_tok_s": round(LONG / medians["mesh_ttft_ms_512"] * 1000, 1),
        "single_prefill_tok_s": round(LONG / medians["single_ttft_ms_512"] * 1000, 1),
        "tokens_equal": equal,
        "nodes_rss_mb": [node["rss_mb"] for node in nodes],
        "nodes_weights_mb": [node["weights_mb"] for node in nodes],
        "cold_start_s": None if mesh.cold_start_s is None else round(mesh.cold_start_s, 2),
        "rounds": figures.values,
        "hops": hops[-1],
        "machine": machine(),
    }


def _ask(mesh: Mesh, prompt: Sequence[int], tokens: int) -> Answer:
    return mesh.serving[0].client.generate(prompt, max_tokens=tokens, temperature=0)


def _together(mesh: Mesh, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Tokens per second of several sessions at once, from the first to the last token that came."""

    def session(prompt: Sequence[int]) -> list[float]:
        arrivals = []
        for piece in mesh.serving[0].client.stream(prompt, max_tokens=tokens, temperature=0):
            if piece.token >= 0:
                arrivals.append(perf_counter())
        return arrivals

    with ThreadPoolExecutor(len(prompts)) as pool:
        arrivals = [moment for times in pool.map(session, prompts) for moment in times]
    return (len(arrivals) - len(prompts)) / (max(arrivals) - min(arrivals))
