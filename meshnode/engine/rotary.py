"""Rotary position tables (RoPE, arXiv 2104.09864) that every machine computes alike, bit for bit.

    cos[position, i] = scale * cos(position * frequencies[i])     sin[position, i] the same with sin

Tables would be most of a model's weightless graph, so it holds their frequencies instead: an initializer whose
external location is `rotary` and whose metadata names the function, the frequencies and the scale. The publisher
writes it (`Rotary.placeholder`); whoever opens the graph computes the table (`parse`, `Rotary.table`).

The angle is rounded to float32 as transformers rounds it. Cosine and sine are computed in float64 from IEEE
additions and multiplications alone: those of libm differ between machines in the last bit, and stages that don't
have the same table don't agree about every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Final, Literal

import numpy as np
import onnx

from meshnode.core.errors import ModelError
from meshnode.engine.backend import Array

Function = Literal["cos", "sin"]

LOCATION: Final = "rotary"  # external location of a table that is computed
_FUNCTION: Final = "function"  # keys of its metadata: "cos" or "sin",
_FREQUENCIES: Final = "frequencies"  # float32 little endian in hexadecimal,
_SCALE: Final = "scale"  # and one more of those
_FLOAT: Final = np.dtype("<f4")

MAX_TABLE_BYTES: Final = 1 << 27  # a damaged graph must not take all memory
_MOST_ANGLE: Final = float(1 << 24)  # up to here the reduction below is exact

_ROWS: Final = 256  # positions at a time: intermediate values stay in the cache
_QUARTERS_PER_RADIAN: Final = float.fromhex("0x1.45f306dc9c883p-1")  # 2 / pi
# pi / 2 in three parts, the first two short enough for exact products with any number of quarter turns up to
# _MOST_ANGLE (Cody and Waite, Software Manual for the Elementary Functions, 1980)
_QUARTER: Final = tuple(float.fromhex(part) for part in ("0x1.921fb54p+0", "0x1.10b46p-30", "0x1.1a62633145c07p-54"))
# Taylor series in the square of an angle up to pi / 4, highest power first: the first term left out is below 1e-17
_SINE: Final = tuple((-1) ** n / factorial(2 * n + 1) for n in range(8, -1, -1))  # times the angle
_COSINE: Final = tuple((-1) ** n / factorial(2 * n) for n in range(8, -1, -1))


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """One table: what it is computed from."""

    function: Function
    frequencies: Array  # float32 [width], radians per position
    scale: float  # attention scaling of long-context models, mostly 1
    positions: int

    def table(self) -> Array:
        """float32 [positions, width]. The same bytes on every machine."""
        frequencies = self.frequencies.astype(np.float32)
        out = np.empty((self.positions, len(frequencies)), np.float32)
        for start in range(0, self.positions, _ROWS):
            rows = out[start : start + _ROWS]
            places = np.arange(start, start + len(rows), dtype=np.float32)
            rows[:] = _wave(self.function, (places[:, None] * frequencies).astype(np.float64))
        out *= np.float32(self.scale)
        return out

    def placeholder(self, name: str) -> onnx.TensorProto:
        """The initializer that stands for the table in a graph file."""
        tensor = onnx.TensorProto(
            name=name,
            dims=(self.positions, len(self.frequencies)),
            data_type=onnx.TensorProto.FLOAT,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        tensor.external_data.add(key="location", value=LOCATION)
        tensor.metadata_props.add(key=_FUNCTION, value=self.function)
        tensor.metadata_props.add(key=_FREQUENCIES, value=self.frequencies.astype(_FLOAT).tobytes().hex())
        tensor.metadata_props.add(key=_SCALE, value=np.array(self.scale, _FLOAT).tobytes().hex())
        return tensor


def is_placeholder(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer stands for a computed table."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL and any(
        entry.key == "location" and entry.value == LOCATION for entry in tensor.external_data
    )


def parse(tensor: onnx.TensorProto) -> Rotary:
    """Read a placeholder. Raises ModelError when it is damaged or its table would be too large."""
    given = {entry.key: entry.value for entry in tensor.metadata_props}
    try:
        function, dims = given[_FUNCTION], tuple(tensor.dims)
        if function not in ("cos", "sin"):
            raise ValueError(f"there is no function {function!r}")
        if tensor.data_type != onnx.TensorProto.FLOAT or len(dims) != 2 or min(dims) < 1:
            raise ValueError(f"a table {dims} of the data type {tensor.data_type} is none of positions and angles")
        if dims[0] * dims[1] * _FLOAT.itemsize > MAX_TABLE_BYTES:
            raise ValueError(f"a table {dims} is larger than {MAX_TABLE_BYTES >> 20} MiB")
        frequencies = np.frombuffer(bytes.fromhex(given[_FREQUENCIES]), _FLOAT)
        (scale,) = np.frombuffer(bytes.fromhex(given[_SCALE]), _FLOAT).tolist()
        if len(frequencies) != dims[1]:
            raise ValueError(f"there are {len(frequencies)} frequencies for {dims[1]} angles")
        if not (np.isfinite(scale) and np.all(np.abs(frequencies) * float(dims[0]) <= _MOST_ANGLE)):
            raise ValueError("a frequency or the scale is no usable number")
    except KeyError as error:
        raise ModelError(
            f"The rotary table {tensor.name} of the graph lacks its {error}. Remove the model and fetch it again."
        ) from error
    except (ValueError, TypeError) as error:  # TypeError: text that is no UTF-8 comes as bytes
        raise ModelError(
            f"The rotary table {tensor.name} of the graph is damaged: {error}. Remove the model and fetch it again."
        ) from error
    return Rotary("cos" if function == "cos" else "sin", frequencies, scale, dims[0])


def _wave(function: Function, angles: Array) -> Array:
    """Cosine or sine of float64 angles up to _MOST_ANGLE, rounded to float32."""
    quarters = np.rint(angles * _QUARTERS_PER_RADIAN)
    rest = angles
    for part in _QUARTER:
        rest = rest - quarters * part
    square = rest * rest
    turned = quarters.astype(np.int64) + (function == "cos")  # cos(x) = sin(x + a quarter turn)
    value = np.where(turned & 1, _series(square, _COSINE), rest * _series(square, _SINE))
    return np.where(turned & 2, -value, value).astype(np.float32)


def _series(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Horner's rule, in two roundings a step: a fused multiply-add would give other bits."""
    out = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        out = out * x + coefficient
    return out
