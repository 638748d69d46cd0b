"""The checkpoint as transformers reads and runs it, in float32 and with the weights of one layer at a time.

transformers' own model does all the work: its own renaming and joining of the checkpoint's tensors, its own masks and
positions, its own layers. Only the weights come when a module is about to run and go when it has run, so a model that
is larger than the memory can be run over a text.

Runs in the publisher only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.publisher.expression import Array
from meshnode.publisher.original import empty_model, layers_of
from meshnode.publisher.words import first_line

_MOST_SCORES: Final = 1 << 27  # values of one layer's attention: above, transformers' frugal attention is taken

OnLayer = Callable[[int, Array, Array], None]  # index, its input and output float32 [rows, tokens, hidden]
OnLinear = Callable[[str, Array], None]  # name of its weight, its input float32 [rows, tokens, inputs]
OnLogits = Callable[[Array], None]  # of the first row: float32 [tokens, vocabulary]


class Tensors(Protocol):
    """Where the weights are: a checkpoint, or files of our own."""

    def names(self) -> list[str]: ...

    def raw(self, name: str) -> Any:
        """One tensor as a torch tensor of any floating type, in memory of its own."""


class _Stop(Exception):
    """Everything that was asked for has run."""


class Reference:
    """A transformers model over a checkpoint. Nothing of it is in memory until it runs.

    Attributes:
      unused: tensors of the checkpoint that transformers does nothing with.
    """

    def __init__(self, checkpoint: Tensors, config: Any) -> None:
        """Raises ModelError when transformers can't build the model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._checkpoint = checkpoint
        self._model = empty_model(config)
        self._layers = layers_of(self._model)
        self._mapping = get_model_conversion_mapping(self._model)
        self._head = self._model.get_output_embeddings()
        expected = self._model.state_dict()
        renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
        self._sources: dict[str, list[str]] = defaultdict(list)  # parameter -> tensors of the checkpoint
        self.unused: list[str] = []
        prefix = self._model.base_model_prefix
        for name in checkpoint.names():
            target, _ = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target = name
            if target in expected:
                self._sources[target].append(name)
            else:
                self.unused.append(name)

    @property
    def has_own_head(self) -> bool:
        """Whether the checkpoint brings a matrix of the head besides the embedding's table."""
        head = next((n for n, m in self._model.named_modules() if m is self._head), "")
        return f"{head}.weight" in self._sources

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def table_names(self) -> list[str]:
        """Names of the embedding's tensors, as transformers has them."""
        table = self._model.get_input_embeddings()
        return [f"{self._path(table)}.{name}" for name in table.state_dict()]

    def layer_weights(self, index: int) -> dict[str, Any]:
        """The tensors of a layer in float32 by transformers' names. Raises ModelError as `run` does."""
        return self._weights(self._layers[index])

    def outer_weights(self) -> dict[str, Any]:
        """Those of everything outside the layers; a tied head has none. Raises ModelError as `run` does."""
        out: dict[str, Any] = {}
        for module in self._outer():
            if module is not self._head or self.has_own_head or not self._ties():
                out |= self._weights(module)
        return out

    def _weights(self, module: Any) -> dict[str, Any]:
        path = self._path(module)
        self._load(module)
        found = {f"{path}.{name}": value.detach() for name, value in module.state_dict().items()}
        for part in module.modules():
            _forget(part)
        return found

    def _outer(self) -> list[Any]:
        """Modules outside the layers that have tensors of their own."""
        inside = {id(m) for layer in self._layers for m in layer.modules()}
        return [
            module
            for module in self._model.modules()
            if id(module) not in inside and next(module.parameters(recurse=False), None) is not None
        ]

    def _path(self, module: Any) -> str:
        return str(next(name for name, known in self._model.named_modules() if known is module))

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self._model.config.get_text_config().num_attention_heads)

    def run(
        self,
        rows: list[list[int]],
        *,
        on_layer: OnLayer | None = None,
        on_linear: OnLinear | None = None,
        on_logits: OnLogits | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Run texts of the same length through the model.

        Args:
          on_layer, on_linear, on_logits: told what comes out while the weights of that part are in memory.
          only: run no other layers than these, and not the head; the others hand on what they get.

        Raises:
          ModelError: weights are missing, or don't fit the shape that config.json describes.
        """
        import torch

        hooks: list[Any] = []
        kept = []
        try:
            for index, layer in enumerate(self._layers):
                if only is not None and index not in only:
                    kept.append((layer, layer.forward))
                    layer.forward = _hand_on(stop=index > max(only))
                    continue
                hooks += self._streamed(layer)
                if on_layer is not None:
                    hooks.append(layer.register_forward_hook(_tell_layer(index, on_layer), with_kwargs=True))
            for module in self._outer():
                hooks += self._streamed(module)
            if on_linear is not None:
                for name, module in self._model.named_modules():
                    if isinstance(module, torch.nn.Linear):
                        hooks.append(module.register_forward_pre_hook(_tell_linear(f"{name}.weight", on_linear)))
            hooks.append(self._head.register_forward_pre_hook(_first_row))
            frugal = only is not None and self.heads * len(rows[0]) ** 2 > _MOST_SCORES
            self._model.set_attn_implementation("sdpa" if frugal else "eager")
            with torch.inference_mode():
                logits = self._model(torch.tensor(rows), use_cache=False).logits
            if on_logits is not None:
                on_logits(logits[0].float().numpy())
        except _Stop:
            pass
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise ModelError(f"transformers can't run this model: {first_line(error)}.") from error
        finally:
            for hook in hooks:
                hook.remove()
            for layer, forward in kept:
                layer.forward = forward
            for module in self._model.modules():
                _forget(module)

    def _streamed(self, module: Any) -> list[Any]:
        """Have the weights of a module come before it runs and go afterwards."""

        def load(module: Any, _inputs: Any) -> None:
            self._load(module)

        def forget(module: Any, _inputs: Any, _output: Any) -> None:
            for part in module.modules():
                _forget(part)

        return [module.register_forward_pre_hook(load), module.register_forward_hook(forget, always_call=True)]

    def _load(self, module: Any) -> None:
        """Raises ModelError when the checkpoint lacks a weight of the module, or has it in another shape."""
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        path = self._path(module)
        wanted = {f"{path}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)}
        wanted |= {f"{path}.{n}" for n, _ in module.named_buffers() if f"{path}.{n}" in self._sources}
        tied = module is self._head and f"{path}.weight" not in self._sources and self._ties()
        if tied:  # the head is the table of the embedding
            table = self._model.get_input_embeddings()
            self._load(table)
            module.weight = table.weight
            _forget(table)
            wanted.discard(f"{path}.weight")
        names = [name for target in wanted for name in self._sources.get(target, ())]
        state = {name: self._checkpoint.raw(name) for name in names}
        found, _ = convert_and_load_state_dict_in_model(
            self._model, state, LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._mapping)
        )
        if found.mismatched_keys:
            name, theirs, ours = sorted(found.mismatched_keys)[0]
            raise ModelError(
                f"The weight {name} of this checkpoint has the shape {list(theirs)}, but the architecture in "
                f"config.json expects the shape {list(ours)}. Is config.json its own?"
            )
        missing = sorted(wanted & {*found.missing_keys, *found.conversion_errors})
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"The checkpoint lacks the weight {missing[0]}{more}, which the architecture in config.json has."
            )

    def _ties(self) -> bool:
        return bool(getattr(self._model.config.get_text_config(), "tie_word_embeddings", False))


def _forget(module: Any) -> None:
    import torch

    for name, value in module._parameters.items():
        if value is not None and not value.is_meta:
            module._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)


def _hand_on(*, stop: bool) -> Callable[..., Any]:
    def forward(hidden: Any, *_arguments: Any, **_named: Any) -> Any:
        if stop:
            raise _Stop
        return hidden

    return forward


def _tell_layer(index: int, on_layer: OnLayer) -> Callable[..., None]:
    def tell(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = inputs[0] if inputs else named["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        on_layer(index, np.asarray(given.float().numpy()), np.asarray(out.float().numpy()))

    return tell


def _tell_linear(name: str, on_linear: OnLinear) -> Callable[..., None]:
    def tell(_module: Any, inputs: tuple[Any, ...]) -> None:
        on_linear(name, np.asarray(inputs[0].float().numpy()))

    return tell


def _first_row(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The head runs over one text only: logits are large."""
    return (inputs[0][:1], *inputs[1:])
