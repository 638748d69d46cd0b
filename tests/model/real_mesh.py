"""Meshes of real nodes with the demonstration model, and the same model in this very process to compare with."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from meshnode.bench.single import stage_spec
from meshnode.config.load import load_config
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.port import AdapterSpec
from meshnode.engine.requests import adapt_request, load_request
from meshnode.engine.sessions import Sessions
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh, Plan
from meshnode.harness.published import published
from meshnode.policy.chunking import chunks
from meshnode.text.question import Question, read_question
from protocols.pipe.messages import Sampling

Json = dict[str, Any]
LAYERS = 30
VARIANTS = ("int4", "int8", "fp32")
PAGES_MB = 60  # shared libraries that resident memory counts in both processes of a node
_CACHE = Path(__file__).parents[2] / "build" / "cache"
_NAME = bytes(16)


def example_folder() -> Path:
    """The demonstration model in every variant as the publisher writes it, kept between runs."""
    return published("example:smollm2", VARIANTS, _CACHE)


def model_folder(variant: str) -> Path:
    """The same folder with one variant in it: a mesh need not hash the others."""
    whole = example_folder()
    folder = _CACHE / "variants" / whole.name / variant
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            out = Path(made) / "out"
            others = [name for other in VARIANTS if other != variant for name in (other, f"graph-{other}.onnx.zlib")]
            shutil.copytree(whole, out, copy_function=os.link, ignore=lambda *_: others)
            index = json.loads((whole / "index.json").read_text(encoding="utf-8"))
            index["variants"] = {variant: index["variants"][variant]}
            (out / "index.json").unlink()  # a link to that of the whole
            (out / "index.json").write_text(json.dumps(index), encoding="utf-8")
            with suppress(OSError):  # another process was faster
                out.rename(folder)
    return folder


@contextmanager
def real_mesh(variant: str, nodes: int, *, spare: int = 0, bootstrap: bool = False) -> Iterator[Mesh]:
    """A ready mesh, stopped at the end. Only with the spare nodes has it more memory than the model needs.


    bootstrap: whether its first member is a bootstrap peer, which has no layers.
    """
    plan = Plan(
        nodes=nodes,
        bootstrap=bootstrap,
        published=model_folder(variant),
        variant=variant,
    )
    with tempfile.TemporaryDirectory(prefix="mesh-") as folder:
        mesh = Mesh.make(Path(folder), plan)
        try:
            mesh.up()
            memory = load_config(mesh.members[-1].folder, {}).serve.memory
            for _ in range(spare):
                mesh.add(str(memory))
            mesh.wait_ready()
            yield mesh
        except BaseException:
            for member in mesh.members:
                print(f"--- {member.name} {member.folder}")
                print(*member.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:], sep="\n")
            raise
        finally:
            mesh.down()


def ask(member: Member, **request: Any) -> Json:
    """The receipt of one question; greedy unless the request says otherwise."""
    return member.client.ask(asked(**request)).whole().as_json()


def asked(**request: Any) -> Question:
    """A question in the fields of `Question`; greedy unless it says otherwise."""
    return read_question({"temperature": 0, "top_p": 1, "seed": 0, **request})


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Look at the nodes again and again, as nothing tells us from outside; fails with `what` in the end."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


class Alone:
    """One variant, all layers in one engine, without a mesh: the same steps, the same sampling."""

    def __init__(self, variant: str) -> None:
        folder = model_folder(variant)
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.eos = frozenset(index["architecture"]["eos_ids"])
        self.stage = OnnxStage(load_request(stage_spec(folder, variant)))
        self._sessions = Sessions(self.stage, load_request(stage_spec(folder, variant)))

    def take(self, adapter: AdapterSpec) -> None:
        """Load an adapter of all layers."""
        self._sessions.adapters.announce(adapt_request(adapter))
        for layer, path in adapter.layers.items():
            self._sessions.adapters.fill(adapter.name, layer, path.read_bytes())

    def answer(self, prompt: Sequence[int], tokens: int, sampling: Sampling, adapter: str = "") -> list[int]:
        """At most `tokens` tokens; an end-of-text token is the last one."""
        prompt = list(prompt)
        capacity = len(prompt) + tokens
        self._sessions.open(
            _NAME,
            first=0,
            last=LAYERS,
            capacity=capacity,
            sampling=sampling,
            prompt=np.asarray(prompt, np.int32),
            adapter=adapter,
        )
        position = 0
        for rows in chunks(len(prompt)):
            token = self._step(position, prompt[position : position + rows], len(prompt), prefill=True)
            position += rows
        out = []
        while token is not None:
            out.append(token)
            if token in self.eos or len(out) == tokens:
                break
            token = self._step(position, [token], position + 1, prefill=False)
            position += 1
        self._sessions.close(_NAME)
        return out

    def _step(self, position: int, ids: list[int], sample_at: int, *, prefill: bool) -> int | None:
        return self._sessions.step(
            _NAME,
            position=position,
            rows=len(ids),
            body=np.asarray(ids, "<i4").tobytes(),
            sample_after=position + len(ids) == sample_at,
            prefill=prefill,
        ).token


@cache
def alone(variant: str) -> Alone:
    return Alone(variant)
