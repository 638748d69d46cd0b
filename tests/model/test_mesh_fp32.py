"""fp32 over three real nodes: token for token what transformers says, whatever is asked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest

from meshnode.harness.mesh import Mesh
from meshnode.harness.receipt import node_line
from tests.model.real_mesh import ask, real_mesh
from tests.model.reference import Reference

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.slow]

Json = dict[str, Any]
TOKENS = 64
NEAR = 1e-3  # below this, float32 sums in another order may choose the other one of the two best tokens

STORY = (
    "The lighthouse keeper wrote down the weather every evening: wind from the north-west, a heavy sea, two ships. "
)
CODE = '''class Stack:
    """Last in, first out."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
'''


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


QUESTIONS: dict[str, Json] = {
    "short": {"messages": user("What is the capital of France?")},
    "one word": {"messages": user("Hi")},
    "list": {"messages": user("Name three fruits and say what colour they have.")},
    "sum": {"messages": user("What is 17 + 25? Explain step by step.")},
    "code question": {"messages": user("Write a Python function that reverses a linked list.")},
    "system": {
        "messages": [{"role": "system", "content": "You answer like a pirate."}, *user("Where is the treasure?")]
    },
    "several turns": {
        "messages": [
            *user("My name is Ada."),
            {"role": "assistant", "content": "Hello Ada! How can I help you?"},
            *user("What is my name, and how many letters has it?"),
        ]
    },
    "empty turn": {"messages": user("")},
    "empty turns": {
        "messages": [
            {"role": "system", "content": ""},
            *user(""),
            {"role": "assistant", "content": ""},
            *user(""),
        ]
    },
    "whitespace turn": {"messages": user(" \n\t ")},
    "special tokens in a turn": {"messages": user("What does <|im_end|> mean? <|im_start|>user\nTell me.")},
    "chinese": {"messages": user("请用一句话介绍一下北京。")},
    "arabic": {"messages": user("ما هي عاصمة مصر؟")},
    "hindi": {"messages": user("भारत की राजधानी क्या है?")},
    "japanese raw": {"prompt": "東京は日本の首都であり、"},
    "emoji": {"messages": user("🦊🌍🚀 What do these mean? 👩‍👩‍👧‍👦🇫🇷")},
    "raw": {"prompt": "Once upon a time, in a small village by the sea,"},
    "raw code": {"prompt": CODE},
    "raw c": {"prompt": "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {\n"},
    "whitespace only": {"prompt": "   \n\n\t  "},
    "one token": {"prompt": "The"},
    "one newline": {"prompt": "\n"},
    "long": {"messages": user(STORY * 30 + "What did the keeper write down?")},
    "longer raw": {"prompt": "".join(f"Line {n}: {n} times {n} is {n * n}.\n" for n in range(60)) + "Line 60:"},
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with real_mesh("fp32", 3) as mesh:
        yield mesh


def first_difference(reference: Reference, prompt: list[int], ours: list[int]) -> list[str]:
    """Compare one answer, going on along ours behind each near tie, which are told. Fails at a real difference."""
    ties, done = [], 0
    while done < len(ours):
        theirs = reference.greedy(prompt + ours[:done], TOKENS - done)
        for place, best in enumerate(theirs, start=done):
            assert place < len(ours), f"ours ends after {len(ours)} tokens, transformers goes on with {best}"
            if ours[place] == best.token:
                continue
            told = f"token {place}: ours {ours[place]}, transformers {best}"
            assert best.logit - best.second_logit < NEAR, told
            assert ours[place] == best.second, told
            ties.append(told)
            done = place + 1
            break
        else:
            assert len(ours) == done + len(theirs), "transformers ended, ours goes on"
            break
    return ties


def test_greedy_tokens_are_those_of_transformers(mesh: Mesh, reference: Reference) -> None:
    import torch

    torch.set_num_threads(1)  # the nodes work at the same time
    began = monotonic()
    with ThreadPoolExecutor(1) as pool:
        answers = {
            name: pool.submit(ask, mesh.serving[0], max_tokens=TOKENS, **question)
            for name, question in QUESTIONS.items()
        }
        compared, equal, lengths, ties = 0, 0, [], []
        for name, question in QUESTIONS.items():
            receipt = answers[name].result()
            chat = "messages" in question
            expected = reference.chat(question["messages"]) if chat else reference.text(question["prompt"])
            assert receipt["prompt_token_ids"] == expected, name
            ours = receipt["token_ids"]
            assert len(receipt["route"]) == 3, name
            assert receipt["reason"] == ("eos" if ours[-1] == reference.eos else "length"), name
            assert ours[-1] == reference.eos or len(ours) == TOKENS, name
            found = first_difference(reference, expected, ours)
            decoded = reference.tokenizer.decode(expected + ours, skip_special_tokens=True)
            assert decoded.rstrip("\ufffd").endswith(receipt["text"]), name
            lengths.append(len(expected))
            compared += len(ours)
            equal += not found
            ties += [f"{name}: {tie}" for tie in found]
    print(f"\n{equal} of {len(QUESTIONS)} prompts of {min(lengths)} to {max(lengths)} tokens are equal,")
    print(f"{compared} tokens in {monotonic() - began:.0f} s; near ties: {ties or 'none'}")
    assert len(QUESTIONS) >= 20
    assert max(lengths) > 600
    assert min(lengths) == 1


def test_every_node_gives_the_same_answer(mesh: Mesh) -> None:
    """The one that is asked need not be the one that holds the first layers."""
    receipts = [ask(member, max_tokens=16, **QUESTIONS["short"]) for member in mesh.serving]
    assert len({tuple(receipt["token_ids"]) for receipt in receipts}) == 1
    assert len({receipt["text"] for receipt in receipts}) == 1
    assert not any(node_line(member)["torch_imported"] for member in mesh.serving)
