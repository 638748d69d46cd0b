"""The file of a weightless graph: an ONNX ModelProto, compressed with zlib (RFC 1950).

A graph is one sentence for every layer again and again, so it shrinks to a twelfth. Files that are not
compressed are read as well: a ModelProto never starts with the byte that a zlib stream starts with.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final

import onnx

from meshnode.core.errors import ModelError

MAX_GRAPH_BYTES: Final = 1 << 26  # decompressed; a model of 80 layers needs less than 1 MiB
_ZLIB: Final = b"\x78"  # compression method and window size; in a ModelProto it would be the tag of a field 15


def pack_graph(model: onnx.ModelProto) -> bytes:
    """The content of the file."""
    return zlib.compress(model.SerializeToString(deterministic=True), 9)


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph file. Raises ModelError when there is no readable graph of a sane size in it."""
    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise ModelError(f"The graph {path} is larger than {MAX_GRAPH_BYTES >> 20} MiB: it is no graph of ours.")
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"The graph {path} can't be read: {error.strerror or error}.") from error
    try:
        return onnx.load_from_string(_unpacked(content) if content.startswith(_ZLIB) else content)
    except Exception as error:  # protobuf's errors share no public base
        raise ModelError(f"The graph {path} is damaged: {error}. Remove the model and fetch it again.") from error


def _unpacked(content: bytes) -> bytes:
    """Raises ValueError or zlib.error."""
    stream = zlib.decompressobj()
    out = stream.decompress(content, MAX_GRAPH_BYTES)
    if stream.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {MAX_GRAPH_BYTES >> 20} MiB")
    if not stream.eof:
        raise ValueError("it is cut off")
    if stream.unused_data:
        raise ValueError("something follows its end")
    return out
