"""The tasks of the harness, as benchmarks of learning train them: without a mesh, through the real trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.core.errors import ModelError
from meshnode.harness.tasks import Task, fetch_intents, intents, logs
from protocols.delta.frame import BOTH, TARGETS, Frame, Target
from protocols.ids import DAG_CBOR, cid_of

RANK: Final = 8
ALPHA: Final = 16
BATCH: Final = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """A task, and how long it is learned."""

    make: Callable[[Path, int], Task]  # given a folder for downloads, and a seed
    targets: tuple[str, ...]
    rounds: int
    steps: int  # a round
    rate: float


TRIALS: Final[Mapping[str, Trial]] = {
    "intents": Trial(
        lambda cache, seed: intents(fetch_intents(cache), seed=seed),
        ("q_proj", "v_proj"),
        rounds=12,
        steps=5,
        rate=5e-3,
    ),
    "logs": Trial(lambda _cache, seed: logs(seed=7 + seed), TARGETS, rounds=16, steps=6, rate=2e-3),
}


def frame_for(published: Path, targets: tuple[str, ...], seed: int, factors: str = BOTH) -> Frame:
    """The upper third of the layers of a published model. Raises ModelError.

    Its base is no manifest but the name of what the publisher wrote.
    """
    try:
        index = (published / "index.json").read_bytes()
        shape = json.loads(index)["architecture"]
        hidden, layers = int(shape["hidden"]), int(shape["layers"])
        query, key = (int(shape[name]) * int(shape["head_dim"]) for name in ("heads", "kv_heads"))
        middle = int(json.loads((published / "config.json").read_bytes())["intermediate_size"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{published} holds no published model that could learn here: {error!r}") from error
    sizes = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key),
        "v_proj": (hidden, key),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, middle),
        "up_proj": (hidden, middle),
        "down_proj": (middle, hidden),
    }
    return Frame(
        base=cid_of(DAG_CBOR, index),
        rank=RANK,
        alpha=ALPHA,
        targets=tuple(Target(name, *sizes[name]) for name in TARGETS if name in targets),
        first=layers - max(1, round(layers / 3)),
        last=layers,
        seed=seed,
        factors=factors,
    )
