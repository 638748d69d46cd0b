"""A model with the factors of a frame, through peft, and their flat vector. Runs in the trainer only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch

from meshnode.core.errors import ModelError
from meshnode.publisher.original import layers_of
from meshnode.trainer.hidden import HiddenStates
from meshnode.trainer.texts import Row
from protocols.delta.frame import Frame, Vector

_ADAPTER = "default"  # peft's name for the only one


class _Reached(Exception):
    """The layer whose output was asked for has run."""


class AdaptedModel:
    """A base model whose linear layers have the factors of a frame.

    Attributes:
      vector: all factors in the order of the frame, float32; what is written into it the model computes with.
      factors: the same, each by its name in the frame.
    """

    def __init__(self, base: Any, frame: Frame, hidden: HiddenStates) -> None:
        """Changes `base`, which can have one frame at a time (`detach`).

        Raises ModelError when the model lacks a layer that the frame names, or has it in another shape.
        """
        self._layers = layers_of(base)
        _check(self._layers, frame)
        self._frame = frame
        self._hidden = hidden
        names = {id(module): name for name, module in base.named_modules()}
        adapted = [_target(layer, t.name) for layer in self._layers[frame.first : frame.last] for t in frame.targets]
        config = peft.LoraConfig(
            r=frame.rank,
            lora_alpha=frame.alpha,
            target_modules=[names[id(linear)] for linear in adapted],
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        self._peft = peft.get_peft_model(base, config)
        self._model = self._peft.get_base_model()
        self.vector = torch.from_numpy(frame.initial().copy())
        self.factors: dict[str, torch.nn.Parameter] = {}
        self.linears: dict[str, torch.nn.Linear] = {}
        views = frame.split(self.vector.numpy())
        for name, shape in frame.tensors:
            linear = self._linear(name)
            if tuple(linear.weight.shape) != shape:
                raise ModelError(f"peft made {name} of the shape {tuple(linear.weight.shape)} instead of {shape}.")
            linear.weight.data = torch.from_numpy(views[name])
            self.factors[name], self.linears[name] = linear.weight, linear
        self._peft.eval()

    def set(self, vector: Vector) -> None:
        """Have the model compute with these factors. Raises LocalProtocolError for a vector of another frame."""
        self._frame.split(vector)
        self.vector.copy_(torch.from_numpy(vector))

    def detach(self) -> Any:
        """The base model, as it was."""
        return self._peft.unload()

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits float32 [tokens, vocabulary] that predict the answers, row after row."""
        first = self._frame.first
        states = None
        if first:
            states = self._hidden.of([row.ids for row in rows], self._below)
        with self._instead(first, states), answers_only(self._model, rows):
            return self._model(padded(rows), use_cache=False).logits[0].float()

    def _below(self, texts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Output of the layer below the first adapted one, [tokens, hidden] of each text."""
        seen: list[torch.Tensor] = []

        def stop(_module: Any, _inputs: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        hook = self._layers[self._frame.first - 1].register_forward_hook(stop)
        try:
            with torch.no_grad():
                self._model(padded([Row(text, ()) for text in texts]), use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return [states[: len(text)] for states, text in zip(seen[0], texts, strict=True)]

    @contextmanager
    def _instead(self, first: int, states: list[torch.Tensor] | None) -> Iterator[None]:
        """Have the layers below give what is known already. Masks and positions stay the model's own."""
        if states is None:
            yield
            return
        known = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)

        def forward(*_arguments: Any, **_named: Any) -> torch.Tensor:
            return known

        below = [self._layers[index] for index in range(first)]
        for layer in below:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in below:
                del layer.forward

    def _linear(self, name: str) -> torch.nn.Linear:
        """The module of a factor by its name in the frame: layers.7.q_proj.A."""
        _, index, target, factor = name.split(".")
        adapted = _target(self._layers[int(index)], target)
        found: torch.nn.Linear = (adapted.lora_A if factor == "A" else adapted.lora_B)[_ADAPTER]
        return found


def padded(rows: Sequence[Row]) -> torch.Tensor:
    """Token ids [rows, tokens]. What follows a text changes nothing in it, so no mask is needed."""
    ids = [torch.tensor(row.ids) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


@contextmanager
def answers_only(model: Any, rows: Sequence[Row]) -> Iterator[None]:
    """Have the head see nothing but the positions that predict answers, as one text [1, tokens, hidden].

    Virtual tokens stand before the texts.
    """
    longest = max(len(row.ids) for row in rows)
    which = torch.tensor([index for index, row in enumerate(rows) for _ in row.answer])
    where = torch.tensor([row.first + k for row in rows for k in range(len(row.answer))])

    def pick(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        before = inputs[0].shape[1] - longest
        return (inputs[0][which, where + before][None], *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def _target(layer: Any, name: str) -> Any:
    """The linear layer with this name in a decoder layer; None when there is none, or several."""
    found = [module for path, module in layer.named_modules() if path.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else None


def _check(layers: Any, frame: Frame) -> None:
    if frame.last > len(layers):
        raise ModelError(f"The frame {frame.cid} has layers up to {frame.last - 1}; the model has {len(layers)}.")
    for target in frame.targets:
        for index in range(frame.first, frame.last):
            linear = _target(layers[index], target.name)
            if not isinstance(linear, torch.nn.Linear):
                raise ModelError(f"The model has no single linear layer {target.name} in its layer {index}.")
            if (linear.in_features, linear.out_features) != (target.inputs, target.outputs):
                raise ModelError(
                    f"The frame {frame.cid} has {target.name} with {target.inputs} inputs and {target.outputs} "
                    f"outputs; in layer {index} of the model it has {linear.in_features} and {linear.out_features}."
                )
