"""The reference: the float32 checkpoint in transformers, and what it tells about its own weights.

It gives the perplexity that variants are compared with, and the mean square of every input of every matrix
over a short mixed text, which says where a rounding error does harm. A model that doesn't fit into free memory
has no reference: it is published without both.

Runs in the publisher only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import psutil

from meshnode.core.errors import ModelError
from meshnode.publisher.checkpoint import Checkpoint
from meshnode.publisher.expression import Array
from meshnode.publisher.quality import perplexity_milli
from meshnode.publisher.words import first_line

_HEADROOM: Final = 1.5  # activations, and the copy that loading makes of the largest tensors
_STEPS: Final = 2.0  # importance is rounded to powers of 2 ** (1 / 2): tiny differences of a CPU don't change a CID
_FUSED: Final = {  # matrices that some checkpoints store together with others of the same input
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class Importance:
    """Importance of the input columns of each matrix: float32 [K], mean around 1."""

    def __init__(self, found: Mapping[str, Array]) -> None:
        self._found = found

    def of(self, sources: list[str]) -> Array | None:
        """By the names of the checkpoint weights that a matrix is made of; None: not known."""
        for name in sources:
            parts = name.split(".")
            fused = ".".join([*parts[:-2], _FUSED.get(parts[-2], parts[-2]), parts[-1]]) if len(parts) > 1 else name
            for known in (name, fused):
                if known in self._found:
                    return self._found[known]
        return None


UNKNOWN: Final = Importance({})  # every input counts the same


def load_reference(checkpoint: Checkpoint) -> Any | None:
    """The checkpoint as a float32 transformers model on the CPU; None when it doesn't fit into free memory.

    Raises ModelError when its weights and its config.json contradict each other.
    """
    import torch
    import transformers

    needed = sum(checkpoint.size(name) for name in checkpoint.names()) * 4
    if needed * _HEADROOM > psutil.virtual_memory().available:
        return None
    fields = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "dtype", "torch_dtype")}
    state = {name: torch.from_numpy(np.array(checkpoint.tensor(name))) for name in checkpoint.names()}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.for_model(checkpoint.config["model_type"], **fields)
        kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"The weights of this checkpoint don't fit the shape that its config.json describes: {first_line(error)}"
        ) from error
    return model.eval()


def measure_reference(model: Any, tokens: list[int]) -> int:
    """Perplexity of the reference, in thousandths."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    return perplexity_milli(logits.float().numpy(), tokens)


def measure_importance(model: Any, tokens: list[int]) -> Importance:
    """Run the reference over a text and look at what every matrix is multiplied with."""
    import torch

    found: dict[str, Array] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def look(_module: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                squares = inputs[0].float().square().reshape(-1, inputs[0].shape[-1])
                found[f"{name}.weight"] = _rounded(squares.mean(dim=0).numpy())

            hooks.append(module.register_forward_pre_hook(look))
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]))
    finally:
        for hook in hooks:
            hook.remove()
    if model.config.tie_word_embeddings and "lm_head.weight" in found:
        found["model.embed_tokens.weight"] = found["lm_head.weight"]
    return Importance(found)


def _rounded(squares: Array) -> Array:
    relative = np.asarray(squares, np.float64) / max(float(squares.mean()), 1e-30)
    steps = np.rint(np.log2(np.clip(relative, 2.0**-12, 2.0**12)) * _STEPS)
    return np.exp2(steps / _STEPS).astype(np.float32)
