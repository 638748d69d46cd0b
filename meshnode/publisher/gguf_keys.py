"""The settings of a model in the metadata of a GGUF file: each is honoured, or the file is refused.

A GGUF file says what a model does in keys like `llama.rope.freq_base`. A key that nobody looks at may change every
answer, and a comparison with transformers would not show it, since transformers would get its configuration from
here. So `Settings` counts what was asked for, and `close` refuses whatever is left.
"""

from __future__ import annotations

from typing import Any, Final

from meshnode.core.errors import ModelError
from meshnode.publisher.gguf import GgufFile

_WITHOUT_EFFECT: Final = frozenset(("rope.scaling.finetuned", "vocab_size"))
# Settings that may be there if they say what is done anyway.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "swin_norm": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}


class Settings:
    """The keys of one architecture in a GGUF file. Raises ModelError for values of the wrong kind."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._name = file.path.name
        self._architecture = architecture
        start = f"{architecture}."
        self._values = {k.removeprefix(start): v for k, v in file.metadata.items() if k.startswith(start)}
        self._asked: set[str] = set()

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number. A list of one number for every layer is that number, if it is always the same."""
        value = self._get(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, list):
            raise ModelError(
                f"{self._name} has another {self._architecture}.{key} in each layer, which is not supported."
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that is no infinity."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value - value != 0:
            raise self._wrong(key, value)
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value)
        return value

    def flags(self, key: str, layers: int) -> list[bool] | None:
        """One flag for each layer; None when the key is missing or holds something else."""
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) != layers or not all(isinstance(v, bool) for v in value):
            return None
        self._asked.add(key)
        return value

    def has(self, key: str) -> bool:
        return key in self._values

    def close(self) -> None:
        """Raises ModelError when a setting is left that nobody asked for and that doesn't say what is done anyway."""
        for key in sorted(self._values.keys() - self._asked - _WITHOUT_EFFECT):
            value = self._values[key]
            if key in _NEUTRAL and value in _NEUTRAL[key]:
                continue
            shown = f"a list of {len(value)}" if isinstance(value, list) else str(value)
            if isinstance(value, float):
                shown = f"{value:g}"
            raise ModelError(
                f"{self._name} has the setting {self._architecture}.{key} ({shown}), which is not supported for GGUF "
                "files of this architecture: without it the model would answer otherwise than it was made to."
            )

    def _get(self, key: str, default: Any) -> Any:
        self._asked.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise ModelError(f"{self._name} lacks {self._architecture}.{key} in its metadata; the file is damaged.")
        return value

    def _wrong(self, key: str, value: Any) -> ModelError:
        return ModelError(
            f"{self._name} has the value {value!r} for {self._architecture}.{key}; the file is damaged."
        )
