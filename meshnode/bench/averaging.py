"""What decentralised averaging costs and gives: schedules, modes and codecs, on toy tasks in virtual time.

    python -m meshnode.bench.averaging --json OUT

Four tables: exchanges until all have the mean, beside fixed and random topologies; the modes beside federated
averaging at equal steps; which factors are trained; and the codecs on a vector as long as an adapter of rank 8 on the
queries and values of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from meshnode.bench.machine import line, machine
from meshnode.policy.mixing import Theirs, averaged
from meshnode.sim.learning import Setting, simulate
from meshnode.sim.toys import Factors, Softmax
from protocols.delta.codec import pack_delta, unpack_delta
from protocols.delta.messages import Codec
from protocols.round.machine import Rules
from protocols.round.schedule import Mode, cycle_of, order_of, pairs_for

ADAPTER: Final = 460_800  # parameters
CLOSE: Final = 1e-3  # relative distance from the mean
SIZES: Final = (16, 25, 32, 64)
Step = Callable[[npt.NDArray[np.float64], int], npt.NDArray[np.float64]]


# ---------------------------------------------------------------- schedules


def consensus(count: int, seed: int) -> dict[str, int]:
    """Exchanges until the values of `count` nodes are within a thousandth of their mean; Base-2: until exact."""
    chance = np.random.default_rng(seed)
    names = [str(i) for i in range(count)]
    powers = max(1, (count - 1).bit_length())
    static = _rows(count, [0, *(1 << k for k in range(powers))])

    def matching(values: npt.NDArray[np.float64], _: int) -> npt.NDArray[np.float64]:
        order = chance.permutation(count)
        mixed = values.copy()
        for one, other in zip(order[::2], order[1::2], strict=False):
            mixed[one] = mixed[other] = (values[one] + values[other]) / 2
        return mixed

    steps: dict[str, Step] = {
        "ring": lambda values, _: _rows(count, [0, 1, count - 1]) @ values,
        "static exponential": lambda values, _: static @ values,
        "one-peer exponential": lambda values, k: _rows(count, [0, 1 << k % powers]) @ values,
        "random matching": matching,
    }
    start = chance.normal(size=count)
    found = {name: _until_close(start, step) for name, step in steps.items()}
    values = dict(zip(names, start, strict=True))
    cycle = cycle_of(Mode.PAIRWISE, order_of(names, "bench", 0), group=2, sites=())
    for readings in cycle:
        values = {
            me: value + sum(float(p.weight) * (values[p.peer] - value) for p in readings.get(me, ()))
            for me, value in values.items()
        }
    if max(abs(value - start.mean()) for value in values.values()) > 1e-12:
        raise AssertionError(f"a cycle of {len(cycle)} exchanges has not given {count} nodes their mean")
    return {**found, "ours (exact)": len(pairs_for(count))}


def _rows(count: int, steps: Sequence[int]) -> npt.NDArray[np.float64]:
    matrix = np.zeros((count, count))
    for step in steps:
        matrix += np.roll(np.eye(count), step, axis=1)
    return matrix / len(steps)


def _until_close(values: npt.NDArray[np.float64], step: Step) -> int:
    mean, first = values.mean(), np.linalg.norm(values - values.mean())
    count = 0
    while np.linalg.norm(values - mean) > CLOSE * first:
        values = step(values, count)
        count += 1
    return count


# ---------------------------------------------------------------- modes


MODES: Final[dict[str, tuple[Mode, int, Codec]]] = {
    "pairs, exact rounds": (Mode.PAIRWISE, 0, Codec.INT8),
    "pairs, one mix": (Mode.PAIRWISE, 1, Codec.INT8),
    "pairs, one mix, int4": (Mode.PAIRWISE, 1, Codec.INT4),
    "noloco": (Mode.NOLOCO, 1, Codec.INT8),
    "elastic": (Mode.ELASTIC, 1, Codec.INT8),
    "group": (Mode.GROUP, 0, Codec.INT8),
    "hierarchical": (Mode.HIERARCHICAL, 0, Codec.INT8),
    "broadcast, sparse": (Mode.BROADCAST, 0, Codec.SPARSE),
}


def modes(nodes: int, rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy, loss and bytes a round and node of each mode, and of federated averaging."""
    toy = Softmax(nodes, seed, inputs=408)
    rows = tuple(range(toy.suite_size))
    workers = [toy.worker(i) for i in range(nodes)]
    alone = [toy.start() for _ in range(nodes)]
    for number in range(1, rounds + 1):
        alone = [worker.train(vector, number) for worker, vector in zip(workers, alone, strict=True)]
    vector, workers = toy.start(), [toy.worker(i) for i in range(nodes)]
    for number in range(1, rounds + 1):
        vector = np.mean([worker.train(vector, number) for worker in workers], axis=0).astype(np.float32)
    dense = 4.0 * toy.frame.parameters
    out = {
        "alone": _figures(toy, alone, rows, 0.0),
        "federated averaging": _figures(toy, [vector], rows, dense),
    }
    for name, (mode, mixes, codec) in MODES.items():
        rules = Rules(lineage="bench", mode=mode, mixes=mixes, group=nodes, least=nodes)
        plan = Setting(nodes=nodes, rounds=rounds, rules=rules, seed=seed, rule="plain", codec=codec)
        course = simulate(toy, plan)
        out[name] = _figures(toy, course.vectors, rows, course.sent / nodes / max(course.rounds))
    return out


def _figures(
    toy: Softmax, vectors: Sequence[npt.NDArray[np.float32]], rows: tuple[int, ...], sent: float
) -> dict[str, float]:
    return {
        "accuracy": round(statistics.mean(toy.score(vector) for vector in vectors), 4),
        "loss": round(statistics.mean(toy.loss(vector, rows) for vector in vectors), 4),
        "bytes_a_round_and_node": round(sent),
    }


def factors(seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Error relative to no adapter after 60 rounds of 8 nodes, by what is trained and how it is mixed."""
    kinds = {"both": ("both", 1), "alternating, 1": ("alternating", 1), "alternating, 5": ("alternating", 5)}
    ways = {"pairs, one mix": (Mode.PAIRWISE, 1), "group": (Mode.GROUP, 0)}
    out: dict[str, dict[str, float]] = {}
    for kind, (trained, period) in (kinds | {"B alone": ("b", 1)}).items():
        for way, (mode, mixes) in ways.items():
            rules = Rules(lineage="bench", mode=mode, mixes=mixes, least=8)
            errors = [
                simulate(
                    Factors(8, seed, factors=trained, period=period),
                    Setting(nodes=8, rounds=60, rules=rules, seed=seed, rule="plain"),
                ).score
                for seed in seeds
            ]
            out.setdefault(kind, {})[way] = round(statistics.mean(errors), 5)
    return out


# ---------------------------------------------------------------- codecs


def codecs(repeats: int = 7) -> dict[str, dict[str, float]]:
    """Error on heavy tails, how many times smaller than float32, and milliseconds (the least of some)."""
    vector = (np.random.default_rng(0).standard_t(3, ADAPTER) * 0.01).astype(np.float32)
    out = {}
    for codec in Codec:
        packed = pack_delta(codec, vector)
        write = _least_ms(repeats, lambda codec=codec: pack_delta(codec, vector))  # type: ignore[misc]
        read = _least_ms(
            repeats,
            lambda codec=codec, data=packed.payload: unpack_delta(data, codec=codec, parameters=ADAPTER),  # type: ignore[misc]
        )
        out[codec.name.lower()] = {
            "error": round(float(np.linalg.norm(packed.sent - vector) / np.linalg.norm(vector)), 4),
            "times_smaller": round(4 * ADAPTER / len(packed.payload), 2),
            "write_ms": write,
            "read_ms": read,
        }
    out["mixing a pair"] = {"read_ms": _least_ms(repeats, lambda: averaged(vector, vector, [Theirs(vector, 0.5)]))}
    return out


def _least_ms(repeats: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return round(1000 * min(times), 2)


def measure(nodes: int, rounds: int, seeds: Sequence[int]) -> dict[str, Any]:
    """All tables."""
    return {
        "machine": machine(),
        "nodes": nodes,
        "rounds": rounds,
        "seeds": list(seeds),
        "exchanges": {str(count): consensus(count, 0) for count in SIZES},
        "modes": [modes(nodes, rounds, seed) for seed in seeds],
        "factors": factors(seeds),
        "codecs": codecs(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures for people; means over the seeds."""
    names = list(result["exchanges"][str(SIZES[0])])
    rows = [f"{'exchanges to the mean':24}" + "".join(f"{'n = ' + count:>10}" for count in result["exchanges"])]
    rows += [f"{name:24}" + "".join(f"{by[name]:10}" for by in result["exchanges"].values()) for name in names]
    rows += ["", f"{'mode':24}{'accuracy':>10}{'loss':>10}{'bytes a round and node':>26}"]
    for name in result["modes"][0]:
        mean = {key: statistics.mean(one[name][key] for one in result["modes"]) for key in result["modes"][0][name]}
        rows.append(f"{name:24}{mean['accuracy']:10.4f}{mean['loss']:10.4f}{mean['bytes_a_round_and_node']:26,.0f}")
    rows += ["", f"{'factors trained':24}{'pairs, one mix':>16}{'group':>12}  (error; no adapter: 1)"]
    rows += [f"{name:24}{by['pairs, one mix']:16.4f}{by['group']:12.4f}" for name, by in result["factors"].items()]
    rows += ["", f"{'codec':24}{'error':>10}{'smaller':>10}{'write ms':>10}{'read ms':>10}"]
    for name, by in result["codecs"].items():
        cells = (by.get(key, "") for key in ("error", "times_smaller", "write_ms", "read_ms"))
        rows.append(f"{name:24}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshnode.bench.averaging", description="Averaging of adapters.")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeded tasks (3)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of each run (60)")
    parser.add_argument("--nodes", type=int, default=4, help="learners in the table of modes (4)")
    options = parser.parse_args(arguments)
    result = measure(options.nodes, options.rounds, range(options.seeds))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(
        f"{line(result['machine'])}\n{options.nodes} learners, {options.rounds} rounds, {options.seeds} seeds\n"
        f"{table(result)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
