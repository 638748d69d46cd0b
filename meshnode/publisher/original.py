"""The model as transformers has it: built without weights, and asked what it does in each of its layers.

Everything that a graph must repeat and that a configuration says in many different ways (windows in some layers, two
bases of rotary positions, layers without positions) is read from what transformers hands to its own layers.

Runs in the publisher only.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.publisher.expression import Array
from meshnode.publisher.words import first_line

_PROBE_WINDOW: Final = 8  # tokens: every sliding window of the probed model is set to this
_PROBE_TOKENS: Final = 24
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NEAR: Final = 1e-5  # between a cosine that transformers made and the same one made from a frequency


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How a layer turns queries and keys (RoPE)."""

    frequencies: Array  # float32 [angles], radians per position
    scale: float  # cosines and sines are multiplied with it
    interleaved: bool  # neighbouring columns are turned together, not column i with column i + angles


@dataclass(frozen=True, slots=True)
class LayerTraits:
    """What is particular to the attention of one layer."""

    window: int | None  # the last so many tokens are seen; None: all of them
    rotation: Rotation | None  # None: the layer knows no positions
    scale: float | None  # of the products of queries and keys; None: transformers doesn't say


@dataclass(frozen=True, slots=True)
class Traits:
    """What transformers does in each layer."""

    config: Any  # the transformers configuration
    layers: tuple[LayerTraits, ...]

    @property
    def growth(self) -> tuple[float, int] | None:
        """Queries at position p are multiplied with 1 + a * log(1 + p // b): (a, b). None: they are not."""
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        beta, period = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        if not beta:
            return None
        if self.config.model_type != "ministral3" or not period:
            raise ModelError(
                f"Models of the architecture {self.config.model_type!r} with llama_4_scaling_beta are not supported."
            )
        return float(beta), int(period)

    @property
    def experts(self) -> bool:
        """Whether tokens choose experts, and two sums of the same numbers may choose differently."""
        text = self.config.get_text_config()
        return any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS)


class _Stop(Exception):
    """The last layer was reached: nothing behind it is wanted."""


def read_config(folder: Path) -> Any:
    """The transformers configuration in `folder`.

    Raises ModelError when transformers doesn't know the architecture.
    """
    import transformers

    family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        raise ModelError(
            f"Models of the architecture {family!r} are unknown to transformers {transformers.__version__}, which "
            "they are compared with."
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError, AttributeError, ImportError) as error:
        raise ModelError(f"transformers can't read the configuration of this model: {first_line(error)}.") from error


def empty_model(config: Any) -> Any:
    """The model of a configuration without its weights (they are on the meta device); buffers are real.

    Raises ModelError when transformers has no causal language model for it, or can't make one.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.float32
            ).eval()
        for module in model.modules():
            meta = [name for name, b in module._buffers.items() if b is not None and b.is_meta]
            for name in meta:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if meta:
                model._init_weights(module)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError, NotImplementedError) as error:
        family = getattr(config, "model_type", "?")
        raise ModelError(
            f"transformers can't build the model of the architecture {family!r} that config.json describes: "
            f"{first_line(error)}."
        ) from error
    return model


def layers_of(model: Any) -> Any:
    """The list of its decoder layers. Raises ModelError when it has none."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or len(layers) != model.config.get_text_config().num_hidden_layers:
        raise ModelError(
            f"Models of the architecture {model.config.model_type!r} can't be cut into layers: "
            "transformers doesn't keep their layers in one list."
        )
    return layers


def read_traits(config: Any) -> Traits:
    """Ask transformers what it does in each layer, with windows made short so that a short text shows them.

    Raises ModelError for attention that is neither full nor a sliding window.
    """
    import copy

    probed = copy.deepcopy(config)
    text = probed.get_text_config()
    window = getattr(text, "sliding_window", None)
    if window:
        text.sliding_window = _PROBE_WINDOW
    model = empty_model(probed)
    handed = _handed(model)
    rotations = _Rotations(model)
    traits = []
    for layer, arguments in zip(layers_of(model), handed, strict=True):
        seen = _window(arguments.get("attention_mask"))
        if seen is not None and seen != _PROBE_WINDOW:
            raise ModelError(
                f"Models of the architecture {config.model_type!r} can't be published: some of their layers attend "
                "to parts of the text that are neither all of it nor a sliding window."
            )
        rotates = _rotates(layer, text, seen)
        rotation = rotations.find(layer, arguments.get("position_embeddings")) if rotates else None
        scale = getattr(getattr(layer, "self_attn", None), "scaling", None)
        traits.append(LayerTraits(window if seen else None, rotation, scale if isinstance(scale, float) else None))
    return Traits(config, tuple(traits))


def _handed(model: Any) -> list[dict[str, Any]]:
    """The keyword arguments that each layer gets for a text of `_PROBE_TOKENS` tokens."""
    import torch

    seen: list[dict[str, Any]] = []
    layers = layers_of(model)

    def probe(hidden: Any, **arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == len(layers):
            raise _Stop
        return hidden

    for layer in layers:
        layer.forward = probe
    width = model.config.get_text_config().hidden_size
    try:
        with torch.inference_mode():
            model.get_decoder()(inputs_embeds=torch.zeros(1, _PROBE_TOKENS, width), use_cache=False)
    except _Stop:
        pass
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"Models of the architecture {model.config.model_type!r} can't be cut into layers: between its layers "
            f"transformers does something of its own ({first_line(error)})."
        ) from error
    return seen


def _window(mask: Any) -> int | None:
    """The window of an additive or boolean mask [1, 1, tokens, tokens]; None: causal over everything; 0: neither."""
    if mask is None:
        return None
    values = mask[0, 0].numpy()
    allowed = values if values.dtype == bool else values == 0
    width = int(allowed[-1].sum())
    distance = np.subtract.outer(np.arange(len(allowed)), np.arange(len(allowed)))
    if not np.array_equal(allowed, (distance >= 0) & (distance < width)):
        return 0
    return None if width == len(allowed) else width


def _rotates(layer: Any, config: Any, window: int | None) -> bool:
    """Whether a layer uses the positions that it is handed."""
    attention = getattr(layer, "self_attn", None)
    use = getattr(attention, "use_rope", None)
    if use is not None:
        return bool(use)
    if config.model_type in ("cohere2", "exaone4") and getattr(config, "sliding_window", None):
        return window is not None  # only layers with a window know positions
    return True


class _Rotations:
    """The rotations of a model: each layer gets one of them."""

    def __init__(self, model: Any) -> None:
        self._candidates = [
            (module, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name.endswith("inv_freq") and not name.startswith("original")
        ]
        self._known: list[Rotation] = []

    def find(self, layer: Any, handed: Any) -> Rotation | None:
        """The rotation that made these cosines and sines [1, tokens, columns]; None when none did."""
        if not isinstance(handed, tuple) or len(handed) < 2:
            return None
        cosines = handed[0][0].float().numpy()
        for _, buffer in self._candidates:
            frequencies = np.array(buffer.float().numpy())
            scale = float(cosines[0, 0])
            if _made_by(cosines, frequencies, scale):
                return self._one(Rotation(frequencies, scale, _interleaved(layer, handed, len(frequencies))))
        return None

    def _one(self, rotation: Rotation) -> Rotation:
        """The same object for the same rotation."""
        for known in self._known:
            alike = known.scale == rotation.scale and known.interleaved == rotation.interleaved
            if alike and np.array_equal(known.frequencies, rotation.frequencies):
                return known
        self._known.append(rotation)
        return rotation


def _made_by(cosines: Array, frequencies: Array, scale: float) -> bool:
    expected = np.cos(np.outer(np.arange(len(cosines)), frequencies)) * scale
    orders = [expected, np.tile(expected, 2), np.repeat(expected, 2, axis=1)]
    return any(e.shape == cosines.shape and np.abs(e - cosines).max() <= _NEAR for e in orders)


def _interleaved(layer: Any, handed: Any, angles: int) -> bool:
    """Whether transformers turns neighbouring columns together: the first column is turned into its partner."""
    import torch

    rotate = getattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        return False
    probe = torch.zeros(1, 1, _PROBE_TOKENS, 2 * angles)
    probe[..., 0] = 1
    try:
        turned = rotate(probe, probe, handed[0], handed[1])[0]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # it works in another way: the gate tells whether that matters
    return bool(turned[0, 0, 1, 1] != 0)
