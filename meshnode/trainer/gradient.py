"""The loss of samples and its gradient. Runs in the trainer only."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from meshnode.trainer.adapted import AdaptedModel
from meshnode.trainer.texts import Row


def losses_of(model: AdaptedModel, rows: Sequence[Row]) -> torch.Tensor:
    """Cross-entropy of each row, float32 [rows]: the mean over the tokens of its label."""
    targets = torch.tensor([token for row in rows for token in row.answer])
    each = torch.nn.functional.cross_entropy(model.logits(rows), targets, reduction="none")
    lengths = [len(row.answer) for row in rows]
    return torch.stack([part.mean() for part in each.split(lengths)])


def gradient_of(model: AdaptedModel, rows: Sequence[Row], moving: Collection[str]) -> tuple[torch.Tensor, float]:
    """Gradient of the mean loss over these tensors, as a flat vector (zero elsewhere); and the loss."""
    loss = losses_of(model, rows).mean()
    factors = [model.factors[name] for name in model.factors if name in moving]
    slopes = iter(torch.autograd.grad(loss, factors))
    whole = [next(slopes) if name in moving else torch.zeros_like(f) for name, f in model.factors.items()]
    return torch.cat([part.reshape(-1) for part in whole]), float(loss.detach())
