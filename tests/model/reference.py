"""What transformers itself says: the checkpoint read by its own reader, float32, eager attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshnode.publisher.checkpoint import EXAMPLES


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
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        package, file, _ = EXAMPLES["smollm2"]
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
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
