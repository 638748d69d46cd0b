"""int8 and int4 over 1, 2, 3 and 5 real nodes: the tokens of one process, and only one's own layers fetched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from time import monotonic
from typing import Any

import numpy as np
import pytest

from meshnode.harness.mesh import Mesh
from meshnode.harness.receipt import complete, node_line
from meshnode.publisher.quality import sample_tokens
from meshnode.text.question import Question
from protocols.pipe.messages import Sampling
from tests.model.real_mesh import LAYERS, PAGES_MB, alone, model_folder, real_mesh

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.slow]

Json = dict[str, Any]
BEYOND_WEIGHTS_MB = 250


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt of `length` tokens and how to answer it; the rest of the fields as in a request."""

    length: int
    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def prompt(self) -> list[int]:
        """Text, from another place for each length."""
        return sample_tokens(model_folder("int4") / "tokenizer.json", 1200)[self.length :][: self.length]

    @property
    def question(self) -> Question:
        return Question(
            token_ids=tuple(self.prompt),
            max_tokens=self.tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            seed=self.seed,
            temperature_milli=round(self.temperature * 1000),
            top_k=self.top_k,
            top_p_micro=round(self.top_p * 1_000_000),
            repetition_milli=round(self.repetition_penalty * 1000),
        )


CASES = (
    Case(20, 40),
    Case(1, 24, temperature=0.9, seed=5),
    Case(257, 8),  # 255 and 2 rows: never a remainder of one
    Case(330, 16),
    Case(24, 24, temperature=0.8, top_p=0.9, seed=3),
    Case(25, 24, temperature=1.3, top_k=40, seed=1 << 60),
    Case(300, 16, temperature=1.0, top_p=0.95, top_k=100, repetition_penalty=1.3, seed=11),
    Case(40, 24, repetition_penalty=1.2),
)


@cache
def expected(variant: str) -> tuple[list[int], ...]:
    return tuple(alone(variant).answer(case.prompt, case.tokens, case.sampling) for case in CASES)


def span_bytes(index: Json, variant: str, first: int, last: int) -> int:
    """Bytes of the weight files of layers [first, last) with the ends that belong to them."""
    entry = index["variants"][variant]
    files = {entry["layers"][k]["path"]: entry["layers"][k]["size"] for k in range(first, last)}
    for end in (["embed"] if first == 0 else []) + (["head"] if last == LAYERS else []):
        files[entry[end]["path"]] = entry[end]["size"]  # tied ends are one file
    return sum(files.values())


def check_fetched(mesh: Mesh, variant: str) -> None:
    """What each node fetched before it was asked anything, which takes a tokenizer."""
    index = json.loads((model_folder(variant) / "index.json").read_text(encoding="utf-8"))
    lines = [node_line(member) for member in mesh.serving]
    for line in lines:
        first, last = line["layers"]
        wanted = span_bytes(index, variant, first, last)
        assert line["weights_mb"] == pytest.approx(wanted / 1e6, rel=0.02)
        print(f"{line['name']} layers {first}-{last - 1}: fetched {line['bytes_fetched']} of {wanted} bytes")
    assert sorted(k for line in lines for k in range(*line["layers"])) == list(range(LAYERS))
    assert lines[0]["bytes_fetched"] == 0  # the publisher has everything
    for line in lines[1:]:
        assert line["bytes_fetched"] == pytest.approx(span_bytes(index, variant, *line["layers"]), rel=0.02)


def check_memory(mesh: Mesh, when: str) -> None:
    for line in (node_line(member) for member in mesh.serving):
        beyond = line["rss_mb"] - line["weights_mb"]
        print(
            f"{line['name']} {when}: {line['rss_mb']} MB = weights {line['weights_mb']} + {beyond:.0f} "
            f"(node {line['node_rss_mb']}, engine {line['engine_rss_mb']})"
        )
        assert beyond <= BEYOND_WEIGHTS_MB + PAGES_MB
        assert not line["torch_imported"]


MESHES = [(variant, nodes) for variant in ("int4", "int8") for nodes in (1, 2, 3, 5)]


@pytest.mark.long
@pytest.mark.parametrize(("variant", "nodes"), MESHES)
def test_the_tokens_are_those_of_one_process(variant: str, nodes: int) -> None:
    wanted = expected(variant)
    began = monotonic()
    with real_mesh(variant, nodes) as mesh:
        ready = monotonic() - began
        print(f"\n{variant} over {nodes}: ready after {ready:.1f} s")
        check_fetched(mesh, variant)
        check_memory(mesh, "before")
        for number, (case, tokens) in enumerate(zip(CASES, wanted, strict=True)):
            asker = mesh.serving[number % nodes]
            receipt = complete(mesh, asker, asker.client.ask(case.question).whole())
            assert receipt["token_ids"] == tokens, case
            assert len({hop["peer"] for hop in receipt["route"]}) == nodes
            assert [receipt["route"][0]["first"], receipt["route"][-1]["last"]] == [0, LAYERS]
        check_memory(mesh, "after")
        assert sum(len(set(tokens)) > 3 for tokens in wanted) == len(CASES)
    print(f"{variant} over {nodes}: {len(CASES)} answers equal, {monotonic() - began:.1f} s in all")


def test_the_cases_tell_samplings_apart() -> None:
    """Each kind of sampling changes the answer to the same prompt; else nothing would be compared."""
    prompt, single = CASES[0].prompt, alone("int4")
    answers = [single.answer(prompt, 24, case.sampling) for case in (CASES[0], *CASES[4:])]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert np.unique([case.length for case in CASES]).size == len(CASES)
