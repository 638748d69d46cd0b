"""An adapter between its two forms: one flat vector, which is trained, and a file for each layer, which is served."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.model.adapter_file import Pair, read_layer, write_layer
from meshnode.model.adapter_fit import MAX_RANK, check_adapter
from protocols.adapter.manifest import AdapterManifest, encode_adapter
from protocols.delta.frame import Frame, Vector, encode_frame
from protocols.ids import DAG_CBOR, Cid
from protocols.manifest.messages import FileRef


class Keeper(Protocol):
    """What we need of the store (`store/port.py`)."""

    def add_file(self, source: Path, *, pin: str) -> Cid: ...

    def put_block(self, data: bytes, codec: int) -> Cid: ...

    def pin(self, cid: Cid, name: str) -> None: ...


def build_adapter(frame: Frame, vector: Vector, store: Keeper, *, version: int, pin: str, half: bool = False) -> Cid:
    """Put an adapter into the store as it is served. Blocking: call it in a thread.

    Args:
      vector: float32 (frame.parameters,).
      version: for people.
      pin: a name in the store that protects its blocks and files.
      half: factors in float16, half as many bytes.

    Returns: the CID of its manifest.

    Raises LocalProtocolError (not a vector of this frame), ModelError (a value is no number, or the rank is above
    64), DiskError.
    """
    if frame.rank > MAX_RANK:
        raise ModelError(f"An adapter of rank {frame.rank} is not served; {MAX_RANK} is the highest rank.")
    files = []
    with tempfile.TemporaryDirectory(prefix="meshnode-adapter-") as folder:
        for layer, content in layer_files(frame, vector, half=half):
            path = Path(folder) / f"layer.{layer}.safetensors"
            path.write_bytes(content)
            files.append(FileRef(cid=store.add_file(path, pin=pin), size=len(content)))
    shape = store.put_block(encode_frame(frame), DAG_CBOR)
    store.pin(shape, pin)
    manifest = AdapterManifest(base=frame.base, frame=shape, version=version, first=frame.first, layers=tuple(files))
    cid = store.put_block(encode_adapter(manifest), DAG_CBOR)
    store.pin(cid, pin)
    return cid


def layer_files(frame: Frame, vector: Vector, *, half: bool = False) -> Iterator[tuple[int, bytes]]:
    """Each layer of an adapter with the content of its file. Raises as `build_adapter`."""
    tensors = frame.split(vector)
    for layer in range(frame.first, frame.last):
        pairs = {
            target.name: Pair(*(tensors[f"layers.{layer}.{target.name}.{factor}"] for factor in ("A", "B")))
            for target in frame.targets
        }
        yield layer, write_layer(pairs, half=half)


def adapter_vector(frame: Frame, manifest: AdapterManifest, read: Callable[[FileRef], bytes]) -> Vector:
    """The vector of an adapter that is served: float32 (frame.parameters,).

    Args:
      read: gives the content of a file.

    Raises ModelError: the manifest or a file does not fit the frame.
    """
    try:
        check_adapter(manifest, frame)
    except ModelError as error:
        raise ModelError(f"The adapter can't be used: {error}.") from None
    vector: Vector = np.empty(frame.parameters, np.float32)
    tensors = frame.split(vector)
    for layer, file in manifest.files(frame.first, frame.last).items():
        try:
            pairs = read_layer(read(file), frame.rank)
            for target in frame.targets:
                pair = pairs.pop(target.name, None)
                if pair is None:
                    raise ModelError(f"it has no {target.name}")
                if (pair.a.shape[1], pair.b.shape[0]) != (target.inputs, target.outputs):
                    raise ModelError(f"its {target.name} has other sizes than the frame")
                tensors[f"layers.{layer}.{target.name}.A"][:] = pair.a
                tensors[f"layers.{layer}.{target.name}.B"][:] = pair.b
            if pairs:
                raise ModelError(f"it has {min(pairs)}, which the frame does not have")
        except ModelError as error:
            raise ModelError(f"The file of layer {layer} of the adapter can't be used: {error}.") from None
    return vector
