"""The precisions a variant can have, and the kernel class that promises exact repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshnode.core.errors import ConfigError

BLOCK: Final = 32  # weights that share one scale, along the input dimension


@dataclass(frozen=True, slots=True)
class Precision:
    """How the matrices of a variant are stored. Norms, biases and KV stay float32 in every variant."""

    name: str
    bits: int  # per weight of a matrix: 32 (float), 8 or 4
    zero_points: bool  # asymmetric blocks: an integer zero point beside each scale
    kernel_class: str  # results are bit-identical within one class, given the same step shapes

    @property
    def quantised(self) -> bool:
        return self.bits < 32


# accuracy_level 4 of MatMulNBits rounds the activations to 8 bits too and multiplies integers: the only
# level that is fast for 8 bits and the faster one for 4 bits on a CPU ("a4" in the class name).
PRECISIONS: Final = {
    p.name: p
    for p in (
        Precision("fp32", 32, False, "ort-cpu-fp32/1"),
        Precision("int8", 8, False, "ort-cpu-int8-b32-a4/1"),
        Precision("int4", 4, True, "ort-cpu-int4-b32-a4/1"),
    )
}


def precision(name: str) -> Precision:
    """Look a variant name up. Raises ConfigError for an unknown one."""
    if name not in PRECISIONS:
        raise ConfigError(f"There is no variant {name!r}. Choose from {', '.join(sorted(PRECISIONS))}.")
    return PRECISIONS[name]
