"""What an adapter costs: one model, opened plain and for adapters, answers in turns within one process.

Three sides: the plain graph, the graph with inputs for factors and none bound, and the same with a random adapter.
The processor's time per token is what counts: other programs stretch the clock on the wall. Where its copies of the
weights come to lie makes an engine faster or slower by up to a tenth, so both are opened anew for every round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.bench.machine import machine
from meshnode.bench.single import answer, stage_spec
from meshnode.core.errors import ConfigError
from meshnode.engine.cut import WeightlessGraph
from meshnode.engine.graph_file import open_graph
from meshnode.engine.lora import Widths
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.port import StageSpec
from meshnode.engine.requests import load_request
from meshnode.engine.sessions import Sessions
from meshnode.model.adapter_file import Pair, write_layer
from meshnode.publisher.quality import sample_tokens
from protocols.enginewire.messages import Adapt

Json = dict[str, Any]
PROMPT: Final = 64  # tokens
PLAIN, OPEN, ADAPTED = "plain", "open", "adapted"
SIDES: Final = (PLAIN, OPEN, ADAPTED)
# one round: whatever else the machine does meets all sides alike
TURNS: Final = (PLAIN, OPEN, ADAPTED, ADAPTED, OPEN, PLAIN)
_NAME: Final = "bench"
_ALPHA: Final = 1  # a random adapter says nothing, and should not lead to an early end


def measure(
    published: Path,
    variant: str,
    *,
    rank: int,
    targets: Sequence[str],
    first: int,
    rounds: int,
    tokens: int,
    say: Callable[[str], None],
) -> Json:
    """Medians of every side, and of the ratios to the plain graph within a round.

    Args:
      published: a folder that the publisher wrote.
      targets: linear layers that the adapter changes, in every layer; () for all that there are.
      first: layers below this one have no factors.
      tokens: length of each answer.

    Raises ConfigError: the model has no such linear layer, or not so many layers.
    """
    text = sample_tokens(published / "tokenizer.json", PROMPT + rounds)
    spec = stage_spec(published, variant)
    sizes = _sizes(spec)
    if not first < len(sizes):
        raise ConfigError(f"the model has the layers 0 to {len(sizes) - 1}; none is left from {first} on")
    chosen = tuple(targets) or tuple(sizes[0])
    unknown = sorted(set(chosen) - set(sizes[0]))
    if unknown:
        raise ConfigError(f"the model has no {unknown[0]}; it has {', '.join(sizes[0])}")
    files = dict(enumerate(_random(sizes[first:], chosen, rank), first))
    announced = Adapt(number=0, adapter=_NAME, first=first, last=len(sizes), rank=rank, alpha=_ALPHA, targets=chosen)
    found: dict[str, list[float]] = {name: [] for name in SIDES}  # milliseconds a token, a median for each round
    said: dict[str, list[list[int]]] = {name: [] for name in SIDES}
    for number in range(rounds):
        answers = _round(spec, announced, files, text[number : number + PROMPT], tokens, plain_first=number % 2 == 0)
        for name, given in answers.items():
            found[name].append(statistics.median(one["decode_cpu_ms"] for one in given))
            said[name] += [one["token_ids"] for one in given]
        say(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.2f} ms" for name, values in found.items()))
    return {
        "variant": variant,
        "rank": rank,
        "targets": list(chosen),
        "first": first,
        "adapter_mb": round(sum(map(len, files.values())) / 1e6, 2),
        **{f"{name}_decode_cpu_ms": round(statistics.median(values), 3) for name, values in found.items()},
        **{f"{name}_ratio": round(_ratio(found[PLAIN], found[name]), 4) for name in (OPEN, ADAPTED)},
        "adapter_ratio": round(_ratio(found[OPEN], found[ADAPTED]), 4),  # of the same engine
        "tokens_equal": said[PLAIN] == said[OPEN],  # those of the adapter are others
        "rounds": found,
        "machine": machine(),
    }


def _sizes(spec: StageSpec) -> list[dict[str, tuple[int, int]]]:
    """For each layer: its linear layers with their inputs and outputs."""
    shape = spec.architecture
    widths = Widths(query=shape.heads * shape.head_dim, key=shape.kv_heads * shape.head_dim)
    out: list[dict[str, tuple[int, int]]] = [{} for _ in range(shape.layers)]
    for product in WeightlessGraph(open_graph(spec.graph)).products(widths):
        for target, columns in product.columns.items():
            out[product.layer][target] = product.inputs, len(columns)
    return out


def _random(sizes: list[dict[str, tuple[int, int]]], targets: Sequence[str], rank: int) -> list[bytes]:
    """The file of each layer of a random adapter."""
    rng = np.random.default_rng(0)
    files = []
    for of_layer in sizes:
        pairs = {}
        for target in targets:
            inputs, outputs = of_layer[target]
            a = rng.standard_normal((rank, inputs), np.float32) * np.float32(inputs**-0.5)
            pairs[target] = Pair(a, rng.standard_normal((outputs, rank), np.float32) * np.float32(0.01))
        files.append(write_layer(pairs))
    return files


def _round(
    spec: StageSpec,
    announced: Adapt,
    files: Mapping[int, bytes],
    prompt: list[int],
    tokens: int,
    *,
    plain_first: bool,
) -> dict[str, list[Json]]:
    """Two engines, opened for this round alone, and what each side answered in its turns."""
    engines: dict[str, Sessions] = {}
    for name in (PLAIN, ADAPTED) if plain_first else (ADAPTED, PLAIN):
        engines[name] = sessions = Sessions(OnnxStage(load_request(spec)), load_request(spec))
        if name == ADAPTED:
            sessions.adapters.announce(announced)
            for layer, content in files.items():
                sessions.adapters.fill(_NAME, layer, content)
        sessions.measure()  # warms up
    sides = {PLAIN: (engines[PLAIN], ""), OPEN: (engines[ADAPTED], ""), ADAPTED: (engines[ADAPTED], _NAME)}
    answers: dict[str, list[Json]] = {name: [] for name in SIDES}
    for name in TURNS:
        sessions, adapter = sides[name]
        answers[name].append(answer(sessions, spec.last, prompt, tokens, adapter))
    return answers


def _ratio(plain: Sequence[float], other: Sequence[float]) -> float:
    """The median of what the rounds say."""
    return statistics.median(b / a for a, b in zip(plain, other, strict=True))
