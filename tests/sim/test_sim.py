"""Whole nodes in virtual time: what a mesh does, and that a seed repeats it."""

from __future__ import annotations

import os
import subprocess
import sys


def run(nodes: int, seed: int, hash_seed: str) -> str:
    """What `python -m meshnode.sim` prints, without the real time."""
    command = [sys.executable, "-m", "meshnode.sim", "--nodes", str(nodes), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if "real" not in line)


def test_the_same_seed_gives_the_same_trace() -> None:
    first = run(6, 3, "1")
    assert "sha256" in first
    assert first == run(6, 3, "2")
