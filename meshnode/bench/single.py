"""A whole model in one process, without a mesh: what the mesh is compared with.

    python -m meshnode.bench.single FOLDER VARIANT [confined]

FOLDER is what the publisher writes; `confined`: as an engine is. One JSON object per line on standard input,
{"prompt": [token ids], "tokens": N}; one per line back, {"token_ids", "ttft_ms", "decode_tok_s", "decode_cpu_ms"} (of
the processor, per token). Greedy; the same prompt steps as in the mesh; no sockets and no other process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from meshnode.core.confinement.environment import child_environment
from meshnode.engine.backend import Stage
from meshnode.engine.enclosed import open_enclosed
from meshnode.engine.port import StageSpec
from meshnode.engine.requests import load_request
from meshnode.engine.sessions import Sessions
from meshnode.policy.chunking import chunks
from protocols.enginewire.messages import Load
from protocols.manifest.messages import Architecture
from protocols.pipe.messages import Sampling

Json = dict[str, Any]
_NAME = bytes(16)


class Single:
    """The child process, seen from the benchmark."""

    def __init__(self, folder: Path, variant: str, *, confined: bool = False) -> None:
        command = [sys.executable, "-P", "-m", "meshnode.bench.single", str(folder), variant]
        self._child = subprocess.Popen(
            [*command, *(["confined"] if confined else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=child_environment(os.environ),
        )
        assert self._child.stdout is not None
        # parts of its confinement that hold, once it is open
        self.confined = tuple(json.loads(self._child.stdout.readline())["confined"])

    @property
    def pid(self) -> int:
        return self._child.pid

    def generate(self, prompt: list[int], tokens: int) -> Json:
        """Greedy tokens of one prompt with their times."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._child.stdin.flush()
        answer: Json = json.loads(self._child.stdout.readline())
        return answer

    def stop(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def stage_spec(folder: Path, variant: str, *, threads: int = 1) -> StageSpec:
    """Every layer of one variant in a folder that the publisher wrote."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    entry, shape = index["variants"][variant], index["architecture"]
    groups = {f"layer.{k}": folder / layer["path"] for k, layer in enumerate(entry["layers"])}
    groups |= {name: folder / entry[name]["path"] for name in ("embed", "head")}
    return StageSpec(
        kind="onnx",
        graph=folder / entry["graph"]["path"],
        groups=groups,
        first=0,
        last=shape["layers"],
        architecture=Architecture(**{**shape, "eos_ids": tuple(shape["eos_ids"])}),
        threads=threads,
        max_sessions=1,
        max_kv_bytes=1 << 40,
    )


def answer(sessions: Sessions, layers: int, prompt: list[int], tokens: int, adapter: str = "") -> Json:
    """One greedy answer of `tokens` tokens; end-of-text tokens do not end it."""
    began = perf_counter()
    sessions.open(
        _NAME,
        first=0,
        last=layers,
        capacity=len(prompt) + tokens,
        sampling=Sampling(seed=0),
        prompt=np.asarray(prompt, np.int32),
        adapter=adapter,
    )
    position, out, times, cpu = 0, [], [], 0.0
    for rows in chunks(len(prompt)):
        body = np.asarray(prompt[position : position + rows], "<i4").tobytes()
        position += rows
        wanted = position == len(prompt)
        token = sessions.step(
            _NAME, position=position - rows, rows=rows, body=body, sample_after=wanted, prefill=True
        ).token
    while True:
        assert token is not None
        out.append(token)
        times.append(perf_counter())
        cpu = cpu or process_time()  # at the first token
        if len(out) == tokens:
            break
        body = np.asarray([token], "<i4").tobytes()
        token = sessions.step(_NAME, position=position, rows=1, body=body, sample_after=True, prefill=False).token
        position += 1
    used_ms = (process_time() - cpu) * 1000
    sessions.close(_NAME)
    steps = len(times) - 1
    return {
        "token_ids": out,
        "ttft_ms": (times[0] - began) * 1000,
        "decode_tok_s": steps / (times[-1] - times[0]) if steps else None,
        "decode_cpu_ms": used_ms / steps if steps else None,
    }


def main(arguments: list[str]) -> int:
    spec = stage_spec(Path(arguments[0]), arguments[1])
    load = load_request(spec)
    stage, parts = _opened(load, confined=arguments[2:] == ["confined"])
    sessions = Sessions(stage, load)
    sessions.measure()  # warms up, as an engine of the mesh does
    sys.stdout.write(json.dumps({"confined": parts}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(json.dumps(answer(sessions, spec.last, request["prompt"], request["tokens"])) + "\n")
        sys.stdout.flush()
    return 0


def _opened(load: Load, *, confined: bool) -> tuple[Stage, tuple[str, ...]]:
    if confined:
        stage, held = open_enclosed(load)
        return stage, held.parts
    from meshnode.engine.onnx_stage import OnnxStage

    return OnnxStage(load), ()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
