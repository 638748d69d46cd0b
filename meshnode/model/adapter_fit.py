"""Whether an adapter can be one for a model, before any of its files is fetched. A node needs no numpy for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from meshnode.core.errors import ModelError
from protocols.adapter.manifest import AdapterManifest
from protocols.manifest.messages import Architecture

if TYPE_CHECKING:
    from protocols.delta.frame import Frame

MAX_RANK: Final = 64  # of an adapter that is served: an engine takes no more
MAX_HEADER_BYTES: Final = 4096  # of a layer's file: 14 tensors in less than 100 bytes each
LENGTH_BYTES: Final = 8  # of the header's length, before it
_MIDDLE: Final = ("gate_proj", "up_proj", "down_proj")


def most_bytes(rank: int, widths: Mapping[str, tuple[int, int]]) -> int:
    """What the file of a layer has at most; `widths`: inputs and outputs of each target."""
    return LENGTH_BYTES + MAX_HEADER_BYTES + 4 * rank * sum(inputs + outputs for inputs, outputs in widths.values())


def check_adapter(manifest: AdapterManifest, frame: Frame) -> None:
    """Whether the files that a manifest names can be an adapter of its frame; before any of them is fetched.

    Raises ModelError, with a part of a sentence.
    """
    if frame.base != manifest.base:
        raise ModelError("it names one release as its base, and its frame another one")
    if (frame.first, frame.last) != (manifest.first, manifest.last):
        raise ModelError(
            f"it has files for the layers {manifest.first} to {manifest.last - 1}, "
            f"its frame is of {frame.first} to {frame.last - 1}"
        )
    if frame.rank > MAX_RANK:
        raise ModelError(f"it has rank {frame.rank}; adapters are served up to rank {MAX_RANK}")
    most = most_bytes(frame.rank, {target.name: (target.inputs, target.outputs) for target in frame.targets})
    largest = max(file.size for file in manifest.layers)
    if largest > most:
        raise ModelError(f"it has a layer of {largest} bytes; with its frame it has {most} at most")


def check_sizes(frame: Frame, shape: Architecture) -> None:
    """Whether the linear layers of a frame can be those of a model of this shape, as far as that is known.

    Raises ModelError, with a part of a sentence.
    """
    if frame.last > shape.layers:
        raise ModelError(f"it is for the layers {frame.first} to {frame.last - 1}; the model has {shape.layers}")
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # how wide a layer is in its middle is in no manifest; the engine knows it. Here it has to be one width
    middles = [t.inputs if t.name == "down_proj" else t.outputs for t in frame.targets if t.name in _MIDDLE]
    middle = middles[0] if middles else 0
    known = {
        "q_proj": (shape.hidden, query),
        "k_proj": (shape.hidden, key),
        "v_proj": (shape.hidden, key),
        "o_proj": (query, shape.hidden),
        "gate_proj": (shape.hidden, middle),
        "up_proj": (shape.hidden, middle),
        "down_proj": (middle, shape.hidden),
    }
    for target in frame.targets:
        inputs, outputs = known[target.name]
        if (target.inputs, target.outputs) != (inputs, outputs):
            raise ModelError(
                f"it takes {target.name} for {target.inputs} inputs and {target.outputs} outputs; in this model it "
                f"has {inputs} and {outputs}"
            )
