"""How good the planner is: against the optimum of a mixed-integer program, and against Petals' rule.

    python -m meshnode.bench.placement --json OUT

Setting: 16 nodes that hold 3, 5, 8 or 12 of 24 layers, at 4, 8, 16 or 40 layers per second give or take 20 %.
The objective is the throughput of the worst covered layer, the yardstick its optimum (HiGHS):
maximise t, each node in at most one window, every layer covered by nodes with a total rate of t or more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshnode.model.fit import ModelFacts
from meshnode.policy.placement import Node, plan

LAYERS: Final = 24
NODES: Final = 16
CAPACITIES: Final = (3, 5, 8, 12)  # layers
RATES: Final = (4_000, 8_000, 16_000, 40_000)  # thousandths of a token per second
LAYER_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One seeded mesh: capacity in layers and rate of each node, whatever its span (thousandths)."""

    capacities: tuple[int, ...]
    rates: tuple[int, ...]


def case_of(seed: int, nodes: int = NODES) -> Case:
    rng = random.Random(seed)
    capacities = tuple(rng.choice(CAPACITIES) for _ in range(nodes))
    rates = tuple(rng.choice(RATES) * rng.randint(800, 1200) // 1000 for _ in range(nodes))
    return Case(capacities, rates)


def flat_model(layers: int = LAYERS) -> ModelFacts:
    """A model of equal layers without ends."""
    return ModelFacts((LAYER_BYTES,) * layers, 0, 0, 0, 0, (1000,) * layers)


def planned(case: Case, layers: int = LAYERS) -> int:
    """The bottleneck of our plan. A node's rate per layer is its rate through its full span, times the span."""
    nodes = [
        Node(peer=f"peer-{i:02}", memory_bytes=capacity * LAYER_BYTES, rate=rate * capacity)
        for i, (capacity, rate) in enumerate(zip(case.capacities, case.rates, strict=True))
    ]
    spans = plan(flat_model(layers), nodes).spans
    return _bottleneck([(*spans[n.peer], case.rates[i]) for i, n in enumerate(nodes) if n.peer in spans], layers)


def _bottleneck(placed: Sequence[tuple[int, int, int]], layers: int) -> int:
    return min(sum(rate for first, last, rate in placed if first <= layer < last) for layer in range(layers))


def petals(case: Case, *, rebalance: bool, layers: int = LAYERS) -> int:
    """The bottleneck of Petals' rule (`block_selection.py`): in order of arrival, each server takes the window
    with the smallest sorted throughputs; with `rebalance` until nobody wants to move."""
    coverage = [0] * layers
    starts: list[int] = []

    def best(index: int) -> int:
        width = case.capacities[index]
        return min(range(layers - width + 1), key=lambda s: (sorted(coverage[s : s + width]), s))

    def add(index: int, start: int, sign: int) -> None:
        for layer in range(start, start + case.capacities[index]):
            coverage[layer] += sign * case.rates[index]

    for index in range(len(case.capacities)):
        starts.append(best(index))
        add(index, starts[index], 1)
    moved = rebalance
    for _ in range(50):
        if not moved:
            break
        moved = False
        for index in range(len(case.capacities)):
            before = min(coverage)
            add(index, starts[index], -1)
            new = best(index)
            add(index, new, 1)
            if min(coverage) > before:
                starts[index], moved = new, True
            else:
                add(index, new, -1)
                add(index, starts[index], 1)
    return min(coverage)


def optimum(case: Case, layers: int = LAYERS, limit_s: float = 6.0) -> tuple[float, float]:
    """The MILP: best bottleneck found within the time limit, and a proven upper bound on it."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    choices = [(i, s) for i, width in enumerate(case.capacities) for s in range(layers - width + 1)]
    count = len(choices)
    cost = np.zeros(count + 1)
    cost[-1] = -1.0
    once = lil_matrix((len(case.capacities), count + 1))
    covered = lil_matrix((layers, count + 1))
    for column, (i, s) in enumerate(choices):
        once[i, column] = 1
        for layer in range(s, s + case.capacities[i]):
            covered[layer, column] = case.rates[i]
    covered[:, count] = -1
    upper = np.ones(count + 1)
    upper[-1] = sum(case.rates)
    with _quiet():
        result: Any = milp(
            cost,
            constraints=[
                LinearConstraint(once.tocsr(), -np.inf, 1),
                LinearConstraint(covered.tocsr(), 0, np.inf),
            ],
            integrality=np.append(np.ones(count), 0),
            bounds=Bounds(np.zeros(count + 1), upper),
            options={"time_limit": limit_s, "mip_rel_gap": 1e-4},
        )
    if result.x is None:
        return 0.0, float(sum(case.rates))
    return float(-result.fun), float(-result.mip_dual_bound)


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS writes debugging lines straight to file descriptor 1; they go nowhere."""
    sys.stdout.flush()
    kept = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


_MEANING: Final = {
    "plan": "our plan / MILP optimum",
    "plan_to_bound": "our plan / MILP upper bound",
    "petals_join": "joining as in Petals / optimum",
    "petals_rebalanced": "joining and rebalancing as in Petals / optimum",
}


def measure(seeds: Sequence[int], limit_s: float) -> dict[str, Any]:
    """Ratios to the MILP of the plan and of Petals' rule, for each seed."""
    rows = []
    for seed in seeds:
        case = case_of(seed)
        start = time.perf_counter()
        ours = planned(case)
        plan_ms = (time.perf_counter() - start) * 1000
        best, bound = optimum(case, limit_s=limit_s)
        best = max(best, float(ours))  # an incumbent that is worse than ours is no optimum
        rows.append(
            {
                "seed": seed,
                "plan": round(ours / best, 4),
                "plan_to_bound": round(ours / bound, 4),
                "petals_join": round(petals(case, rebalance=False) / best, 4),
                "petals_rebalanced": round(petals(case, rebalance=True) / best, 4),
                "plan_ms": round(plan_ms, 1),
            }
        )
    summary = {
        name: {"mean": round(statistics.mean(r[name] for r in rows), 4), "min": min(r[name] for r in rows)}
        for name in ("plan", "plan_to_bound", "petals_join", "petals_rebalanced")
    }
    return {"nodes": NODES, "layers": LAYERS, "milp_limit_s": limit_s, "summary": summary, "cases": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m meshnode.bench.placement", description="Planner against optimum."
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seeds", type=int, default=12, help="how many seeded meshes (12)")
    parser.add_argument("--limit", type=float, default=6.0, help="seconds for each MILP (6)")
    options = parser.parse_args(arguments)
    sys.stdout.write(f"{options.seeds} meshes of {NODES} nodes for {LAYERS} layers, {options.limit:g} s each...\n")
    sys.stdout.flush()
    result = measure(range(options.seeds), options.limit)
    for name, ratio in result["summary"].items():
        sys.stdout.write(f"{_MEANING[name]:44} mean {ratio['mean']:.3f}   min {ratio['min']:.3f}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["summary"]["plan"]["mean"] >= 0.95 and result["summary"]["plan"]["min"] >= 0.90 else 1


if __name__ == "__main__":
    sys.exit(main())
