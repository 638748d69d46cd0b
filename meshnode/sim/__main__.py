"""`python -m meshnode.sim --nodes 20 --seed 1`: a mesh that is hurt and heals, with the digest of its trace."""

from __future__ import annotations

import argparse
import hashlib
import time
from functools import partial
from pathlib import Path

from meshnode.sim.run import simulate
from meshnode.sim.scenarios import heal


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m meshnode.sim", description=heal.__doc__)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what the nodes logged")
    arguments = parser.parse_args()
    began = time.perf_counter()
    figures, trace = simulate(partial(heal, nodes=arguments.nodes, layers=arguments.layers), arguments.seed)
    wall_s = time.perf_counter() - began
    text = "\n".join(trace)
    if arguments.trace is not None:
        arguments.trace.write_text(text)
    for name, seconds in figures.items():
        print(f"{name:<28}{seconds:8.2f} s, virtual")
    print(f"{'all of it':<28}{wall_s:8.2f} s, real")
    print(f"trace: {len(trace)} lines, sha256 {hashlib.sha256(text.encode()).hexdigest()}")


main()
