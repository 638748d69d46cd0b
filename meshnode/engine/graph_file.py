"""The file of a weightless graph: an ONNX ModelProto, compressed with zlib (RFC 1950).

A graph is one sentence for every layer again and again, so it shrinks to a twelfth. Files that are not
compressed are read as well: a ModelProto never starts with the byte that a zlib stream starts with.

Nobody gets a graph out of a file but through the checks here: its size, its encoding (`graph_wire.py`), then what it
says (`graph_check.py`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx

from meshnode.core.errors import ModelError
from meshnode.engine.graph_check import check_graph
from meshnode.engine.graph_wire import Refused, scan

MAX_GRAPH_BYTES: Final = 1 << 26  # decompressed; a model of 80 layers needs less than 1 MiB
_ZLIB: Final = b"\x78"  # compression method and window size; in a ModelProto it would be the tag of a field 15


@dataclass(frozen=True, slots=True)
class GraphFile:
    """The bytes of a graph file, not looked at yet."""

    source: str  # for people: its CID, or where it lies
    content: bytes

    def model(self) -> onnx.ModelProto:
        """The graph. Raises ModelError when there is none of a sane size in it, or one that must not be run, and
        MemoryError."""
        try:
            content = _unpacked(self.content) if self.content.startswith(_ZLIB) else self.content
            if not content:
                raise ValueError("it is empty")
            scan(content)
            model = onnx.load_from_string(content)
            model.DiscardUnknownFields()  # values of enumerations that protobuf doesn't know, and keeps aside
            check_graph(model)
        except Refused as error:
            if error.damaged:
                raise self._damaged(error) from error
            raise ModelError(
                f"The graph {self.source} is not run: {error}. A graph may only compute on its release's weights, "
                "and within bounds. Serve another model, or have the publisher add this one again."
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # protobuf's errors share no public base
            _need_room_for(self.content)
            raise self._damaged(error) from error
        return model

    def _damaged(self, error: Exception) -> ModelError:
        return ModelError(f"The graph {self.source} is damaged: {error}. Remove the model and fetch it again.")


def pack_graph(model: onnx.ModelProto) -> bytes:
    """The content of the file."""
    return zlib.compress(model.SerializeToString(deterministic=True), 9)


def open_graph(path: Path, name: str = "") -> GraphFile:
    """Read a graph file. Raises ModelError when it can't be read, or is too large. `name`: for people."""
    source = name or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_GRAPH_BYTES + 1)
    except OSError as error:
        raise ModelError(f"The graph {source} can't be read: {error.strerror or error}.") from error
    if len(content) > MAX_GRAPH_BYTES:
        raise ModelError(f"The graph {source} is larger than {MAX_GRAPH_BYTES >> 20} MiB: it is no graph of ours.")
    return GraphFile(source, content)


def read_graph(path: Path) -> onnx.ModelProto:
    """Read and check a graph file. Raises ModelError."""
    return open_graph(path).model()


def _need_room_for(content: bytes) -> None:
    """Raises MemoryError where a graph can't be unpacked for want of memory, which protobuf reports as damage."""
    bytearray(max(1 << 20, 8 * len(content)))


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
