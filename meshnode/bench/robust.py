"""How much hostile peers spoil: our rules beside those of others, on a toy task in virtual time.

    python -m meshnode.bench.robust --json OUT

Setting: 16 learners in one group, 3 of them hostile, softmax regression on data that differ from node to node
(Dirichlet 0.5). The yardstick of each seed is the run of the 13 honest ones alone with all defences. Every run goes
through the real records, codec and rounds. Accuracy is the mean of the honest nodes after the last round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from meshnode.bench.machine import line, machine
from meshnode.sim.attacks import PLANS
from meshnode.sim.baselines import RULES
from meshnode.sim.learning import Course, Setting, simulate
from meshnode.sim.toys import Softmax
from protocols.round.machine import Rules
from protocols.round.schedule import Mode

NODES: Final = 16
HOSTILE: Final = 3
MOST_LOST: Final = 2.0  # points, of our rules with the gate
# rule of the simulation, gated, limited in distance
OURS: Final = {"cap + CS+": ("own", False), "cap + CS+ + gate": ("own", True)}
OTHERS: Final = {name: (name, False) for name in RULES} | {"mean + gate": ("plain", True)}


def course_of(
    toy: Softmax, rule: tuple[str, bool], rounds: int, seed: int, attack: str, nodes: int = NODES
) -> Course:
    """One run; without an attack the hostile nodes are not there."""
    rules = Rules(lineage="bench", mode=Mode.GROUP, group=nodes, least=nodes)
    name, gated = rule
    return simulate(
        toy,
        Setting(
            nodes=nodes if attack else nodes - HOSTILE,
            rounds=rounds,
            rules=rules,
            seed=seed,
            rule=name,
            gated=gated,
            hostile=HOSTILE if attack else 0,
            attack=attack,
        ),
    )


def measure(seeds: Sequence[int], rounds: int, nodes: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Accuracy of each rule without an attack and under each, for each seed; and the worst loss in points."""
    accuracy: dict[str, dict[str, list[float]]] = {}
    lost: dict[str, dict[str, list[float]]] = {}
    refused: dict[str, int] = {}
    for seed in seeds:
        toy = Softmax(nodes, seed)
        yardstick = course_of(toy, OURS["cap + CS+ + gate"], rounds, seed, "", nodes).score
        for name, rule in (OTHERS | OURS).items():
            say(f"seed {seed}: {name}")
            for attack in ("", *PLANS):
                course = course_of(toy, rule, rounds, seed, attack, nodes)
                label = attack or "none"
                accuracy.setdefault(name, {}).setdefault(label, []).append(round(course.score, 4))
                lost.setdefault(name, {}).setdefault(label, []).append(round(100 * (yardstick - course.score), 2))
                if not attack and name in OURS:
                    refused[name] = refused.get(name, 0) + course.refused.total()
    worst = {name: max(statistics.mean(values) for values in by.values()) for name, by in lost.items()}
    return {
        "machine": machine(),
        "nodes": nodes,
        "hostile": HOSTILE,
        "rounds": rounds,
        "seeds": list(seeds),
        "accuracy": accuracy,
        "points_lost": lost,
        "worst_mean_points_lost": {name: round(value, 2) for name, value in worst.items()},
        "honest_refused_without_attack": refused,
    }


def table(result: dict[str, Any]) -> str:
    """Rows of rules, columns of attacks: mean accuracy in percent over the seeds, and the worst loss."""
    attacks = ("none", *PLANS)
    rows = [f"{'':20}" + "".join(f"{name:>12}" for name in (*attacks, "worst lost"))]
    for name, by in result["accuracy"].items():
        cells = [f"{100 * statistics.mean(by[attack]):12.1f}" for attack in attacks]
        rows.append(f"{name:20}" + "".join(cells) + f"{result['worst_mean_points_lost'][name]:12.1f}")
    return "\n".join(rows)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshnode.bench.robust", description="Rules against attacks.")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeded tasks (3)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of each run (60)")
    options = parser.parse_args(arguments)
    result = measure(range(options.seeds), options.rounds, NODES, _say)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(
        f"{line(result['machine'])}\n{NODES} learners, {HOSTILE} hostile, {options.rounds} rounds, "
        f"{options.seeds} seeds; accuracy in %, points lost beside the honest ones alone\n{table(result)}\n"
        f"honest deltas refused without attack: {result['honest_refused_without_attack']}\n"
    )
    ours = result["worst_mean_points_lost"]["cap + CS+ + gate"]
    return 0 if ours <= MOST_LOST and not any(result["honest_refused_without_attack"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
