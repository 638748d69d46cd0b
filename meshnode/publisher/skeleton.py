"""The graph of a model without its weights: mobius builds it, and transformers says what its layers must do.

mobius knows some hundred architectures, but not every setting of each of them. So the parts in which settings differ
are taken from transformers (`original.py`): which linear maps have a bias, the window and the positions of every
layer, the size of the heads, whether the head is the embedding's table. Attention is one operator of ONNX Runtime
everywhere, which keeps the layers apart and writes keys and values in place.

Runs in the publisher only: mobius imports torch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from meshnode.core.errors import ModelError
from meshnode.engine.rotary import Rotary
from meshnode.publisher.heads import Widening, wide_frequencies, widening
from meshnode.publisher.original import LayerTraits, Rotation, Traits
from meshnode.publisher.words import first_line

_BUILD_ERRORS: Final = (
    ValueError,
    KeyError,
    TypeError,
    OSError,
    NotImplementedError,
    AttributeError,
    AssertionError,
    IndexError,
)
ROTARY: Final = "rotary_table"  # start of the names of our rotary tables in the graph


@dataclasses.dataclass(frozen=True, slots=True)
class Skeleton:
    """What `build_skeleton` made."""

    model: ir.Model  # every layer's output is named hidden_states.k
    rename: Callable[[dict[str, Any]], dict[str, Any]]  # the checkpoint's tensors -> the architecture's
    rotary: dict[str, Rotary]  # tables of the graph that can be computed, by initializer
    wide: Widening | None  # how heads were made wider


def build_skeleton(folder: Path, traits: Traits, shapes: Mapping[str, tuple[int, ...]], context: int) -> Skeleton:
    """Build the graph of the model whose config.json lies in `folder`.

    Args:
      traits: what transformers does in its layers.
      shapes: of the checkpoint's tensors, by name.
      context: positions that rotary tables are made for.

    Raises:
      ModelError: mobius doesn't know the architecture, or can't build this model of it.
    """
    import mobius

    family = str(traits.config.model_type)
    if family not in mobius.registry:
        raise ModelError(f"Models of the architecture {family!r} are not supported by the graph builder.")
    made: list[_Build] = []
    wanted = _Wanted(traits, shapes, context)
    try:
        package = mobius.build(
            str(folder),
            dtype="f32",
            load_weights=False,
            execution_provider="cpu",
            output_layer_indices=list(range(len(traits.layers))),
            module_class=_recorded(mobius.registry.get(family), wanted, made),
        )
    except _BUILD_ERRORS as error:
        if "output_layer_indices" in str(error):
            raise _uncut(family) from error
        raise ModelError(
            f"The graph builder can't build models of the architecture {family!r}: {first_line(error)}."
        ) from error
    if "model" not in package or not made:
        raise ModelError(f"Models of the architecture {family!r} are not decoder-only language models.")
    return Skeleton(package["model"], made[0].module.preprocess_weights, made[0].tables, made[0].wide)


def _uncut(family: str) -> ModelError:
    return ModelError(
        f"Models of the architecture {family!r} can't be cut into layers: the graph builder doesn't build them as a "
        "list of layers of one kind."
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    traits: Traits
    shapes: Mapping[str, tuple[int, ...]]
    context: int

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's table."""
        return not any(name.endswith("lm_head.weight") for name in self.shapes)

    @property
    def widening(self) -> Widening | None:
        config = self.traits.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotations = [layer.rotation for layer in self.traits.layers if layer.rotation is not None]
        if len({(len(r.frequencies), r.interleaved) for r in rotations}) > 1:
            return None  # nobody makes such models; the kernel refuses what it can't take
        return widening(width, rotations[0] if rotations else None)


def _recorded(base: Any, wanted: _Wanted, made: list[_Build]) -> type:
    """A subclass of the builder's model that does in each layer what `wanted` says, and names their outputs."""

    class Recorded(base):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            wide = wanted.widening
            changes: dict[str, Any] = {"output_layer_indices": None, "tie_word_embeddings": wanted.tied}
            if wide is not None:
                config.head_dim = changes["head_dim"] = len(wide.places)  # the builder asks this one, too
                changes["partial_rotary_factor"] = 1.0
            self._wide = wide
            super().__init__(dataclasses.replace(config, **changes))
            made.append(_Build(self, wanted, wide))
            made[-1].change()

        def forward(self, op: Any, *arguments: Any, **named: Any) -> Any:
            logits, present, *_ = super().forward(op, *arguments, **named)
            return logits, present, made[-1].outputs

        def preprocess_weights(self, state: dict[str, Any]) -> dict[str, Any]:
            state = super().preprocess_weights(state)
            return state if self._wide is None else _widened(state, self._wide)

    return Recorded


def _widened(state: dict[str, Any], wide: Widening) -> dict[str, Any]:
    out = {}
    for name, value in state.items():
        part = name.split(".")[-2] if "." in name else ""
        if value.numel() and part in ("q_proj", "k_proj", "v_proj"):
            value = wide.rows(value)
        elif value.numel() and part == "o_proj" and name.endswith(".weight"):
            value = wide.columns(value)
        out[name] = value
    return out


class _Build:
    """One run of the builder: changes its modules, and is called in the place of its attention."""

    def __init__(self, module: Any, wanted: _Wanted, wide: Widening | None) -> None:
        self.module = module
        self.outputs: list[Any] = []  # of the layers, in their order
        self.tables: dict[str, Rotary] = {}
        self._wanted = wanted
        self.wide = wide
        self._lengths: tuple[Any, Any] | None = None
        self._rotary: dict[int, Any] = {}  # by the id of a rotation
        self._mask: Any = None
        self._positions: Any = None
        self._growth: Any = None

    def change(self) -> None:
        from mobius.components import Attention
        from mobius.models.gemma import Gemma2Attention

        backbone: Any = getattr(self.module, "model", None)
        if not hasattr(backbone, "layers"):
            raise _uncut(str(self._wanted.traits.config.model_type))
        if len(backbone.layers) != len(self._wanted.traits.layers):
            raise ValueError(f"it has {len(backbone.layers)} layers, and not {len(self._wanted.traits.layers)}")
        self._take_biases()
        table: Any = getattr(backbone, "embed_tokens", None)
        if hasattr(table, "embed_scale"):  # mobius rounds it to two decimals
            table.embed_scale = float(self._wanted.traits.config.get_text_config().hidden_size ** 0.5)
        for layer, traits in zip(backbone.layers, self._wanted.traits.layers, strict=True):
            attention: Any = getattr(layer, "self_attn", None)
            ours = type(attention) in (Attention, Gemma2Attention)
            if ours:
                attention.forward = _Attention(self, attention, traits)
            layer.forward = self._recording(layer.forward, ours)
        self.module.forward = self._with_mask(self.module.forward)

    def _with_mask(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(op: Any, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
            self._mask, self._positions = attention_mask, position_ids
            return forward(op, input_ids, attention_mask, position_ids, past_key_values)

        return run

    def _recording(self, forward: Callable[..., Any], ours: bool) -> Callable[..., Any]:
        """The forward function of a layer, which keeps its output and needs no mask where the attention is ours."""
        signature = inspect.signature(forward)

        def run(*arguments: Any, **named: Any) -> Any:
            bound = signature.bind(*arguments, **named)
            if ours and "attention_bias" in signature.parameters:
                bound.arguments["attention_bias"] = None
            result = forward(*bound.args, **bound.kwargs)
            self.outputs.append(result[0])
            return result

        return run

    def _take_biases(self) -> None:
        """Give linear maps a bias, or take it away, as the checkpoint has it."""
        import torch
        from mobius.components import Linear
        from onnxscript import nn

        empty = {n: torch.empty(s, device="meta") for n, s in self._wanted.shapes.items()}
        names = set(self.module.preprocess_weights(empty))
        for path, module in self.module.named_modules():
            if not isinstance(module, Linear) or f"{path}.weight" not in names:
                continue
            has = f"{path}.bias" in names
            if has and module.bias is None:
                module.bias = nn.Parameter([module.weight.shape[0]])
            elif not has and module.bias is not None:
                del module._parameters["bias"]
                module.bias = None

    # ------------------------------------------------------------ called while the graph is built

    def lengths(self, op: Any) -> tuple[Any, Any]:
        """What the attention operator wants: the last valid index int32 [batch], and the number of tokens, int32."""
        if self._lengths is None:
            last = op.Sub(op.ReduceSum(self._mask, [1], keepdims=0), op.Constant(value_int=1))
            total = op.Gather(op.Shape(self._mask), op.Constant(value_int=1))
            self._lengths = op.Cast(last, to=ir.DataType.INT32), op.Cast(total, to=ir.DataType.INT32)
        return self._lengths

    def growth(self, op: Any) -> Any:
        """What queries are multiplied with as the text gets longer, [batch, tokens, 1]; None: they are not."""
        grows = self._wanted.traits.growth
        if grows is not None and self._growth is None:
            beta, period = grows
            times = op.Floor(op.Div(op.Cast(self._positions, to=ir.DataType.FLOAT), float(period)))
            self._growth = op.Unsqueeze(op.Add(op.Mul(op.Log(op.Add(times, 1.0)), float(beta)), 1.0), [-1])
        return self._growth

    def rotary(self, op: Any, rotation: Rotation) -> tuple[Any, Any]:
        """Cosines and sines [context, angles] of a rotation: initializers that stand for computed tables."""
        from onnxscript import nn

        if id(rotation) not in self._rotary:
            frequencies = wide_frequencies(rotation.frequencies)
            tables = nn.Module(f"{ROTARY}.{len(self._rotary)}")
            shape = (self._wanted.context, len(frequencies))
            for function in ("cos", "sin"):
                # One number that takes no memory: only what it stands for is written. Another one for each table,
                # or the builder would make one of two.
                mark = np.float32(len(self._rotary) + (0.5 if function == "sin" else 0))
                data = ir.tensor(np.broadcast_to(mark, shape))
                setattr(tables, f"{function}_cache", nn.Parameter(list(shape), name=f"{function}_cache", data=data))
            tables.forward = lambda op: None
            tables(op)
            rotary = {
                "cos": Rotary("cos", frequencies, rotation.scale, shape[0]),
                "sin": Rotary("sin", frequencies, rotation.scale, shape[0]),
            }
            self.tables |= {getattr(tables, f"{f}_cache").name: r for f, r in rotary.items()}
            self._rotary[id(rotation)] = tables
        tables = self._rotary[id(rotation)]
        return tables.cos_cache, tables.sin_cache


class _Attention:
    """The forward function of an attention module: one GroupQueryAttention."""

    def __init__(self, build: _Build, module: Any, traits: LayerTraits) -> None:
        wide = build.wide
        if wide is not None:
            if module.q_norm is not None:
                raise ValueError(
                    f"its heads of {wide.width} values are normalised, which is only possible for multiples of 16"
                )
            if module.scaling == len(wide.places) ** -0.5:
                module.scaling = wide.width**-0.5
        if traits.scale is not None:
            module.scaling = traits.scale
        self._build = build
        self._module = module
        self._traits = traits

    def __call__(
        self,
        op: Any,
        hidden_states: Any,
        attention_bias: Any = None,
        position_embeddings: Any = None,
        past_key_value: Any = None,
        **_: Any,
    ) -> Any:
        module, traits = self._module, self._traits
        query, key = module.q_proj(op, hidden_states), module.k_proj(op, hidden_states)
        value = module.v_proj(op, hidden_states)
        if module.q_norm is not None and module.k_norm is not None:
            if module._qk_norm_full:
                query, key = module.q_norm(op, query), module.k_norm(op, key)
            else:
                query, key = self._normalised(op, query, module.q_norm), self._normalised(op, key, module.k_norm)
        growth = self._build.growth(op)
        if growth is not None:
            query = op.Mul(query, growth)
        inputs = [query, key, value, *(past_key_value or (None, None)), *self._build.lengths(op)]
        attributes: dict[str, Any] = {
            "num_heads": module.num_attention_heads,
            "kv_num_heads": module.num_key_value_heads,
            "scale": float(module.scaling),
            "do_rotary": int(traits.rotation is not None),
        }
        if traits.rotation is not None:
            inputs += self._build.rotary(op, traits.rotation)
            attributes["rotary_interleaved"] = int(traits.rotation.interleaved)
        if module._softcap:
            attributes["softcap"] = float(module._softcap)
        if traits.window is not None:
            attributes["local_window_size"] = traits.window
        out, *present = op.GroupQueryAttention(*inputs, _domain="com.microsoft", _outputs=3, **attributes)
        return module.o_proj(op, out), tuple(present)

    def _normalised(self, op: Any, states: Any, norm: Any) -> Any:
        """Each head by itself: [batch, tokens, heads * width] there and back."""
        heads = op.Reshape(states, [0, 0, -1, self._module.head_dim])
        return op.Reshape(norm(op, heads), [0, 0, -1])
