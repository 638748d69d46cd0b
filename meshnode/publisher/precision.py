"""The precisions a variant can have, and the kernel class that promises exact repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshnode.core.errors import ConfigError

BLOCK: Final = 32  # weights that share one scale, along the input dimension


@dataclass(frozen=True, slots=True)
class Packing:
    """How one quantised matrix is stored."""

    bits: int  # per weight: 8 or 4
    zero_points: bool  # asymmetric blocks: an integer zero point beside each scale


@dataclass(frozen=True, slots=True)
class Precision:
    """How the matrices of a variant are stored. Norms, biases and KV stay float32 in every variant."""

    name: str
    packing: Packing | None  # None: float32
    kernel_class: str  # results are bit-identical within one class, given the same step shapes
    # Root mean square of the difference of the logits, relative to their standard deviation, that is let through.
    # Logits that have nothing to do with each other differ by 1.41.
    most_deviation: float
    finer: Packing | None = None  # for the value projections alone

    def packing_of(self, weight: str) -> Packing | None:
        """The packing of one matrix, by its name in the architecture.

        What chooses the experts of a token stays float32: it is tiny, and another choice is another model. The value
        projections are few (1.6 of 86 MB in SmolLM2-135M) and lose most by 4 bits: stored in 8 bits they
        take away a third of the divergence from the float32 model (Kullback-Leibler, 0.124 to 0.081).
        """
        if weight.endswith(_ROUTERS):
            return None
        return self.finer if self.finer is not None and ".v_proj." in weight else self.packing


_ROUTERS: Final = (".gate.weight", "_gate.weight", ".router.weight")
_INT8: Final = Packing(bits=8, zero_points=False)
_INT4: Final = Packing(bits=4, zero_points=True)

# accuracy_level 4 of MatMulNBits rounds the activations to 8 bits too and multiplies integers: the only
# level that is fast for 8 bits and the faster one for 4 bits on a CPU ("a4" in the class name).
PRECISIONS: Final = {
    p.name: p
    for p in (
        Precision("fp32", None, "ort-cpu-fp32/1", 1e-3),
        Precision("int8", _INT8, "ort-cpu-int8-b32-a4/1", 0.5),
        Precision("int4", _INT4, "ort-cpu-int4-b32-a4/1", 1.2, finer=_INT8),
    )
}


def precision(name: str) -> Precision:
    """Look a variant name up. Raises ConfigError for an unknown one."""
    if name not in PRECISIONS:
        raise ConfigError(f"There is no variant {name!r}. Choose from {', '.join(sorted(PRECISIONS))}.")
    return PRECISIONS[name]
