"""Roll-outs among two hundred nodes, some of which lie: how often the mesh decides rightly, and what it costs.

    meshnode bench rollout

Each case runs on many seeds, in virtual time. A better adapter must be released everywhere; a worse one must be
revoked everywhere, and at most 8 % of the nodes may ever use it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from meshnode.sim.rollout import EPOCH_S, PACE, SAMPLES, SPREAD, USUAL, Outcome, Truth, roll_out

NODES: Final = 200
SLOW: Final = 8.0  # epochs that the slowest honest voter takes, where voters are slow
CASES: Final = (
    # name, change in loss, part of the nodes that lie, epochs of the slowest honest voter
    ("better, 20 % lie", -0.02, 0.2, 1.5),
    ("worse, 20 % lie", 0.05, 0.2, 1.5),
    ("slightly better, 30 % lie", -0.01, 0.3, 1.5),
    ("slightly worse, 30 % lie", 0.01, 0.3, 1.5),
    ("worse, 30 % lie, slow voters", 0.05, 0.3, SLOW),
)


def measure(seeds: Sequence[int], nodes: int) -> dict[str, Any]:
    """Every case on every seed."""
    cases = []
    for name, delta, lying, slowest in CASES:
        began = time.perf_counter()
        liars = round(nodes * lying)
        outcomes = [
            roll_out(Truth(delta=delta), nodes=nodes, liars=liars, seed=seed, slowest=slowest) for seed in seeds
        ]
        cases.append(
            {"case": name, "delta": delta, "liars": liars, "slowest_epochs": slowest, **_summary(outcomes)}
            | {"seconds": round(time.perf_counter() - began, 1)}
        )
        sys.stdout.write(line(cases[-1]) + "\n")
        sys.stdout.flush()
    return {
        "nodes": nodes,
        "seeds": len(seeds),
        "epoch_s": EPOCH_S,
        "collect_s": PACE.collect_s,
        "soak_s": PACE.soak_s,
        "samples": SAMPLES,
        "sample_spread": SPREAD,
        "usual_wrong_answers": USUAL,
        "cases": cases,
    }


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "wrong_decisions": sum(not outcome.is_right for outcome in outcomes),
        "wrong_seeds": [outcome.seed for outcome in outcomes if not outcome.is_right],
        "released_least": min(outcome.released for outcome in outcomes),
        "revoked_least": min(outcome.revoked for outcome in outcomes),
        "used_at_once_most": max(outcome.most for outcome in outcomes),
        "epochs_median": statistics.median(outcome.epochs for outcome in outcomes),
        "epochs_most": max(outcome.epochs for outcome in outcomes),
    }


def line(case: dict[str, Any]) -> str:
    """One case for people."""
    ending = (
        f"released at {case['released_least']:.1%} of the nodes or more"
        if case["delta"] < 0
        else f"used by {case['used_at_once_most']:.1%} at most, revoked at {case['revoked_least']:.1%} or more"
    )
    return (
        f"{case['case']:<30}{case['wrong_decisions']} wrong decisions; {ending}; after "
        f"{case['epochs_median']:g} epochs ({case['epochs_most']:g} at most)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshnode.bench.rollout", description="Roll-outs beside liars.")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seeds", type=int, default=100, help="runs of each case (100)")
    parser.add_argument("--nodes", type=int, default=NODES, help=f"in each run ({NODES})")
    options = parser.parse_args(arguments)
    result = measure(range(options.seeds), options.nodes)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if not any(case["wrong_decisions"] for case in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
