"""Real nodes over real sockets for the tests: a small model for the null engine, questions, command lines."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from meshnode.api.messages import Status
from meshnode.harness.member import Member, clean_environment
from meshnode.harness.mesh import Mesh, Plan
from meshnode.text.question import Question

Json = dict[str, Any]

MARK = "TEST_OF_MESH"  # in the environment of every process of a test's mesh
LAYERS = 24
CONTEXT = 4096
WORDS = 256
QUESTION = Question(token_ids=(5, 6, 7), max_tokens=12, temperature=0)
ENDLESS = replace(QUESTION, max_tokens=2000)  # takes long enough to be interrupted
NO_COPIES = (("content.replicas", 1),)  # where a test counts what serving alone fetches
READY_S = 60.0  # generous: the machine may be busy with other things


def small_model(
    folder: Path,
    *,
    layers: int = LAYERS,
    layer_bytes: int = 1 << 16,
    template: str = "",
    variants: tuple[str, ...] = ("int4",),
) -> Path:
    """A folder as the publisher writes it. The weights are noise: the null engine never opens them.

    template: for chats; none without it.
    """
    noise = random.Random(7)
    folder.mkdir(parents=True)

    def write(name: str, data: bytes) -> Json:
        (folder / name).write_bytes(data)
        return {"path": name, "size": len(data)}

    vocabulary = {f"w{i}": i for i in range(WORDS)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }

    def variant(name: str) -> Json:
        part = "" if len(variants) == 1 else f"{name}/"
        (folder / part).mkdir(exist_ok=True)
        return {
            "kernel_class": "null/1",
            "graph": write(f"{part}graph", noise.randbytes(5_000)),
            "embed": write(f"{part}embed", noise.randbytes(20_000)),
            "layers": [write(f"{part}layer.{i}", noise.randbytes(layer_bytes)) for i in range(layers)],
            "head": write(f"{part}head", noise.randbytes(20_000)),
        }

    files = {"tokenizer.json": write("tokenizer.json", json.dumps(tokenizer).encode())}
    if template:
        files["chat_template.jinja"] = write("chat_template.jinja", template.encode())
    index = {
        "name": "small-noise",
        "architecture": {
            "family": "llama",
            "layers": layers,
            "hidden": 32,
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 4,
            "vocab": WORDS,
            "context": CONTEXT,
            "bos_ids": [],
            "eos_ids": [],
        },
        "files": files,
        "variants": {name: variant(name) for name in variants},
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@contextmanager
def mesh_of(
    folder: Path, nodes: int, *, published: Path | None = None, wait: bool = True, **plan: Any
) -> Iterator[Mesh]:
    """A running mesh that is stopped whatever happens; afterwards no process of it is left.

    `wait`: until it answers, if there is a model.
    """
    settings = (("serve.engine", "null"), *plan.pop("settings", ()))
    before, began = os.environ.get(MARK, ""), time.time()
    os.environ[MARK] = str(folder)
    mesh = Mesh.make(folder / "mesh", Plan(nodes=nodes, published=published, settings=settings, **plan))
    try:
        mesh.up()
        if wait and published is not None:
            mesh.wait_ready(READY_S)
        yield mesh
    finally:
        mesh.down()
        os.environ[MARK] = before
        left = processes_in(folder, began)
        for process in left:
            process.kill()
        assert not left, f"still running: {[process.cmdline() for process in left]}"


def processes_in(folder: Path, since: float) -> list[psutil.Process]:
    """Processes that were started for this mesh, and what they started: they inherited its mark. Engines inherit
    nothing, but name their node; one that began after `since` and has lost its node is counted as well."""
    found, engines = [], []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                found.append(process)
            elif "meshnode.engine.child" in process.cmdline() and process.create_time() >= since:
                engines.append((process, int(process.cmdline()[-1])))
    nodes = {process.pid for process in found}
    return [*found, *(engine for engine, node in engines if node in nodes or not psutil.pid_exists(node))]


def tokens_of(member: Member, question: Question = QUESTION) -> list[int]:
    """The whole answer of one node. Raises what `Client.ask` raises."""
    return list(member.client.ask(question).whole().token_ids)


def serving(status: Status) -> dict[str, tuple[int, int]]:
    """Who serves which layers, as one node sees it."""
    rows = [status.me, *status.peers]
    return {row.peer: (row.first, row.last) for row in rows if row.first is not None and row.last is not None}


def meshnode(*arguments: object, seconds: float = 60.0, folder: Path | None = None, **env: str) -> Ran:
    """Run one command line; `folder` is its data folder."""
    words = [str(argument) for argument in arguments]
    if folder is not None:
        words += ["--data", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "meshnode", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        env={**clean_environment(), **env},
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


class Ran:
    """What one command line did."""

    def __init__(self, code: int, out: str, errors: str) -> None:
        self.code = code
        self.out = out
        self.errors = errors

    def sentence(self) -> str:
        """Its one line of complaint, notes left out; anything else is a failure of the test."""
        assert self.code not in (0, None), f"it went through: {self.out}"
        assert "Traceback" not in self.errors, self.errors
        lines = [
            line
            for line in self.errors.splitlines()
            if line.startswith("meshnode") and not line.startswith("meshnode: note: ")
        ]
        assert len(lines) == 1, self.errors
        return lines[0]
