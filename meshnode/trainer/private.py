"""DP-SGD on the factors of an adapter (Abadi et al., arXiv 1607.00133). Runs in the trainer only.

Every factor is a linear layer without bias that is used once in a pass, so the gradient of one sample is the sum over
its tokens of (gradient of the output) x (input): all of a batch come out of one backward pass. Noise and the choice
of samples come from the system's randomness, through PCG64: good against whoever sees adapters, not against whoever
can make this process repeat itself. Floating-point sums are not hardened (Mironov 2012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from meshnode.trainer.adapted import AdaptedModel
from meshnode.trainer.gradient import losses_of
from meshnode.trainer.port import Privacy
from meshnode.trainer.texts import Row

_TOGETHER: Final = 8  # samples of one pass: each has a gradient of its own in memory


def drawn(count: int, chance: float) -> list[int]:
    """Each index below `count` with this probability, by secret chance (Poisson sampling)."""
    return [int(i) for i in np.flatnonzero(np.random.default_rng().random(count) < chance)]


def noise(size: int, deviation: float) -> torch.Tensor:
    """Secret Gaussian noise, float32 [size]."""
    return torch.from_numpy(np.random.default_rng().normal(0.0, deviation, size).astype(np.float32))


def clipped_sum(
    model: AdaptedModel, rows: Sequence[Row], places: Mapping[str, slice], privacy: Privacy
) -> tuple[torch.Tensor, list[float]]:
    """The sum of the clipped gradients over the tensors in `places`, as a flat vector; and the losses."""
    total = torch.zeros_like(model.vector)
    losses: list[float] = []
    for at in range(0, len(rows), _TOGETHER):
        each, found = per_sample(model, rows[at : at + _TOGETHER], places)
        norms = torch.sqrt(sum((g * g).sum(dim=1) for g in each.values()))
        scale = (privacy.clip / norms.clamp_min(1e-12)).clamp(max=1.0)
        for name, gradients in each.items():
            total[places[name]] += scale @ gradients
        losses += found
    return total, losses


def per_sample(
    model: AdaptedModel, rows: Sequence[Row], places: Mapping[str, slice]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Gradients [rows, values] of each row's own loss by the name of the tensor; and the losses."""
    found: dict[str, torch.Tensor] = {}
    hooks = [model.linears[name].register_forward_hook(_watch(name, found)) for name in places]
    try:
        losses = losses_of(model, rows)
        losses.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for factor in model.factors.values():
            factor.grad = None
    return found, losses.detach().tolist()


def _watch(name: str, found: dict[str, torch.Tensor]) -> Any:
    def forward(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        given = inputs[0].detach()

        def backward(slope: torch.Tensor) -> None:
            found[name] = torch.einsum("bto,bti->boi", slope.float(), given.float()).flatten(1)

        output.register_hook(backward)

    return forward
