"""AdamW over the tensors of a flat vector (Loshchilov and Hutter, arXiv 1711.05101). Runs in the trainer only.

Of our own, because its state is then two more flat vectors, which are kept with the adapter; and because tensors that
are not trained in a step keep their moments as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import torch

_BETAS: Final = (0.9, 0.999)
_EPSILON: Final = 1e-8


@dataclass(slots=True)
class AdamW:
    """
    Attributes:
      places: name of each tensor -> where it is in the vector.
      first, second: moments, float32 vectors.
      steps: how often each tensor has moved, by name.
    """

    places: Mapping[str, slice]
    first: torch.Tensor
    second: torch.Tensor
    steps: dict[str, int]
    weight_decay: float = 0.0

    def step(self, vector: torch.Tensor, gradient: torch.Tensor, rate: float, moving: Collection[str]) -> None:
        """Move the tensors with these names."""
        with torch.no_grad():
            for name in moving:
                place = self.places[name]
                k = self.steps[name] = self.steps.get(name, 0) + 1
                value, slope, m, v = (whole[place] for whole in (vector, gradient, self.first, self.second))
                value.mul_(1 - rate * self.weight_decay)
                m.mul_(_BETAS[0]).add_(slope, alpha=1 - _BETAS[0])
                v.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
                divisor = (v / (1 - _BETAS[1] ** k)).sqrt_().add_(_EPSILON)
                value.addcdiv_(m, divisor, value=-rate / (1 - _BETAS[0] ** k))
