"""The file of one layer of an adapter: a safetensors file of its factors, strict both ways.

For every target there is "{target}.A" (rank, inputs) and "{target}.B" (outputs, rank), float32 or float16; y = W x +
alpha / rank * B (A x). The format is that of the safetensors library (a length of 8 bytes, a header in JSON, the
bytes), of which only this is read: no holes, no further tensors, no metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from meshnode.core.errors import ModelError
from meshnode.model.adapter_fit import LENGTH_BYTES, MAX_HEADER_BYTES

Factor = npt.NDArray[np.float32]

MAX_WIDTH: Final = 1 << 20  # of a linear layer
_ALIGN: Final = 8
_NAME: Final = re.compile(r"([a-z]{1,8}_proj)\.([AB])")
_TYPES: Final[dict[str, np.dtype[Any]]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one linear layer."""

    a: Factor  # (rank, inputs)
    b: Factor  # (outputs, rank)


def write_layer(pairs: Mapping[str, Pair], *, half: bool = False) -> bytes:
    """The content of a layer's file. `half`: in float16, half as many bytes.

    Raises ModelError for a number that is none, or too large for float16.
    """
    kind = "F16" if half else "F32"
    entries: dict[str, object] = {}
    parts: list[bytes] = []
    position = 0
    for target, pair in pairs.items():
        for factor, value in (("A", pair.a), ("B", pair.b)):
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(value, _TYPES[kind])
            if not np.isfinite(stored).all():
                raise ModelError(f"The factor {factor} of {target} has numbers that {kind} can't hold.")
            end = position + stored.nbytes
            name = f"{target}.{factor}"
            entries[name] = {"dtype": kind, "shape": list(stored.shape), "data_offsets": [position, end]}
            parts.append(stored.tobytes())
            position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + b"".join(parts)


def read_layer(data: bytes, rank: int) -> dict[str, Pair]:
    """The pairs of a layer by target, as float32 (views of `data` where it is that already).

    Raises ModelError, with a part of a sentence: not such a file, another rank, a factor without its other one, a
    value that is no number.
    """
    entries, start = _header(data)
    found: dict[str, dict[str, Factor]] = {}
    position = start
    for name, entry in entries.items():
        known = _NAME.fullmatch(name)
        if known is None:
            raise ModelError(f"it has a tensor {name[:40]!r}; it may have factors like q_proj.A and q_proj.B")
        kind, shape = _described(name, entry)
        target, factor = known.groups()
        if shape[0 if factor == "A" else 1] != rank:
            raise ModelError(f"{name} has the shape {shape[0]} x {shape[1]}, which is not of rank {rank}")
        end = position + prod(shape) * kind.itemsize
        if entry["data_offsets"] != [position - start, end - start] or end > len(data):
            raise ModelError(f"{name} does not lie where its file and its shape say")
        array = np.frombuffer(data, kind, prod(shape), position).astype(np.float32, copy=False).reshape(shape)
        if not np.isfinite(array).all():
            raise ModelError(f"{name} has values that are no numbers")
        found.setdefault(target, {})[factor] = array
        position = end
    if position != len(data):
        raise ModelError(f"{len(data) - position} bytes follow after its last tensor")
    if not found:
        raise ModelError("it has no factors")
    for target, factors in found.items():
        if len(factors) != 2:
            raise ModelError(f"{target} has only its factor {min(factors)}")
    return {target: Pair(factors["A"], factors["B"]) for target, factors in found.items()}


def _header(data: bytes) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries in their order, and where the bytes of the tensors begin. Raises ModelError."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or length > MAX_HEADER_BYTES or LENGTH_BYTES + length > len(data):
        raise ModelError("it is no safetensors file of factors")
    try:
        entries = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
    except (ValueError, RecursionError):
        raise ModelError("its header is no JSON") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ModelError("its header describes no tensors")
    return entries, LENGTH_BYTES + length


def _described(name: str, entry: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, int]]:
    """Raises ModelError for a type or shape that no factor has."""
    kind, shape = entry.get("dtype"), entry.get("shape")
    if entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(kind, str) or kind not in _TYPES:
        raise ModelError(f"{name} is described in an unknown way, or not float32 or float16")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 1 <= size <= MAX_WIDTH for size in shape)
    ):
        raise ModelError(f"{name} has a shape that no factor has")
    return _TYPES[kind], (shape[0], shape[1])
