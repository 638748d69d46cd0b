"""A small random model in its variant `train`, with a tokenizer of whole words, and samples that it can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from meshnode.trainer.port import ModelFiles, Sample, Schedule, TrainJob
from protocols.delta.frame import Frame, Target
from protocols.ids import DAG_CBOR, cid_of

COLOURS = ("red", "green", "blue")
THINGS = {"red": ("rose", "blood", "brick"), "green": ("leaf", "frog", "moss"), "blue": ("sky", "sea", "jeans")}
WORDS = ("<pad>", "<s>", "the", "is", "very", "old", "new", "what", "dark", *COLOURS, *sum(THINGS.values(), ()))
HIDDEN, HEADS, KV_HEADS, LAYERS, MIDDLE = 32, 4, 2, 4, 48
WIDTHS = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HIDDEN * KV_HEADS // HEADS),
    "v_proj": (HIDDEN, HIDDEN * KV_HEADS // HEADS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, MIDDLE),
    "up_proj": (HIDDEN, MIDDLE),
    "down_proj": (MIDDLE, HIDDEN),
}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def frame_of(
    *targets: str, first: int = 2, last: int = LAYERS, rank: int = 4, seed: int = 3, name: str = "tiny"
) -> Frame:
    """A frame of the small model: q_proj and v_proj unless others are named."""
    wanted = [Target(target, *WIDTHS[target]) for target in WIDTHS if target in (targets or ("q_proj", "v_proj"))]
    base = cid_of(DAG_CBOR, name.encode())
    return Frame(base=base, rank=rank, alpha=8, targets=tuple(wanted), first=first, last=last, seed=seed)


def samples(count: int, *, seed: int = 0, colours: tuple[str, ...] = COLOURS) -> tuple[Sample, ...]:
    """Sentences about things of a colour."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        colour = chance.choice(colours)
        padding = " ".join(chance.choice(("very", "old", "new", "dark")) for _ in range(chance.randrange(1, 5)))
        found.append(Sample(f"what is the {padding} {chance.choice(THINGS[colour])}", colour))
    return tuple(found)


def job_of(folder: Path, model: ModelFiles, **changes: Any) -> TrainJob:
    frame = changes.pop("frame", None) or frame_of()
    steps = changes.setdefault("steps", 8)
    given: dict[str, Any] = {
        "folder": folder,
        "model": model,
        "frame": frame,
        "start": frame.initial(),
        "samples": samples(24),
        "schedule": Schedule(rate=0.02, total=steps),
        "compute": "float32",
    }
    return TrainJob(**{**given, **changes})


def tiny_model(folder: Path, *, tied: bool = True, seed: int = 1, **changes: Any) -> ModelFiles:
    """Publish the model into a folder. Takes as long as torch and transformers need to be imported."""
    import torch
    import transformers

    from meshnode.publisher.reference import Reference
    from meshnode.publisher.training import write_training_variant

    folder.mkdir(parents=True, exist_ok=True)
    raw = {**CONFIG, "vocab_size": len(WORDS), "tie_word_embeddings": tied, **changes}
    config = transformers.AutoConfig.for_model(**raw)
    torch.manual_seed(seed)
    state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    if tied:
        state.pop("lm_head.weight", None)
    entry = write_training_variant(Reference(_Tensors(state), config), folder, lambda done, total: None)
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder / "tokenizer.json")
    paths = {"embed": folder / entry["embed"]["path"], "head": folder / entry["head"]["path"]}
    paths |= {f"layer.{k}": folder / layer["path"] for k, layer in enumerate(entry["layers"])}
    return ModelFiles(
        name=f"tiny-{seed}-{tied}",
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        index=folder / entry["graph"]["path"],
        groups=paths,
    )


def write_tokenizer(path: Path) -> None:
    """Words and blanks between them; every text begins with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.add_special_tokens(["<s>"])
    fast.save(str(path))


class _Tensors:
    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def names(self) -> list[str]:
        return list(self._state)

    def raw(self, name: str) -> Any:
        return self._state[name].clone()
