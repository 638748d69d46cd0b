"""The rotary frequencies of a model, as transformers has them.

The graph builder computes its own in numpy, whose powers differ from torch's in the last bit; at position 8000 that
turns an angle by 0.0002. Answers are compared with transformers, so its frequencies count.

Runs in the publisher only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshnode.publisher.expression import Array


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """What transformers turns positions into angles with."""

    values: Array  # float32 [angles], radians per position
    scale: float  # cosines and sines are multiplied with it
    certain: bool  # right even where the graph builder's table says something else


def rotary_frequencies(folder: Path) -> Frequencies | None:
    """Ask transformers for the frequencies of the model whose config.json lies in `folder`.

    None when the model has no rotary embedding, several different ones, or one that transformers can't make.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):  # shapes without memory: only the kind of its rotary embedding is wanted
            model = transformers.AutoModelForCausalLM.from_config(config)
        kinds = {type(m) for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)}
        if len(kinds) != 1:
            return None
        rotary = kinds.pop()(config)
        return Frequencies(
            values=np.array(rotary.inv_freq.float().numpy()),
            scale=float(rotary.attention_scaling),
            # the builder scales every text, transformers only one that is longer than the model's context
            certain=rotary.rope_type == "dynamic",
        )
    except (ValueError, KeyError, TypeError, OSError, NotImplementedError, AttributeError, ImportError):
        return None  # the graph builder knows the model nevertheless, and its own tables stay
