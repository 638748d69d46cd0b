"""Random adapters for small models, as engines and stores take them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.engine.port import AdapterSpec
from meshnode.model.adapter import build_adapter
from meshnode.model.adapter_file import Pair, write_layer
from meshnode.store.port import OpenFile
from protocols.adapter.manifest import decode_adapter
from protocols.delta.frame import Frame
from protocols.ids import RAW, Cid, cid_of
from protocols.manifest.messages import FileRef

# inputs and outputs of the linear layers of tests/conformance/tiny_model.py
WIDTHS = {
    "q_proj": (64, 64),
    "k_proj": (64, 32),
    "v_proj": (64, 32),
    "o_proj": (64, 64),
    "gate_proj": (64, 128),
    "up_proj": (64, 128),
    "down_proj": (128, 64),
}
ALL = tuple(WIDTHS)
RANK, ALPHA = 4, 8


def random_pairs(seed: int, layer: int, targets: Sequence[str] = ALL, *, rank: int = RANK) -> dict[str, Pair]:
    """Factors that belong to the seed and the layer, large enough to change every answer."""
    rng = np.random.default_rng((seed, layer))
    out = {}
    for target in targets:
        inputs, outputs = WIDTHS[target]
        a = rng.standard_normal((rank, inputs)) * inputs**-0.5
        b = rng.standard_normal((outputs, rank)) * 0.5
        out[target] = Pair(a.astype(np.float32), b.astype(np.float32))
    return out


def written(
    folder: Path, name: str, seed: int, first: int, last: int, targets: Sequence[str] = ALL, *, rank: int = RANK
) -> AdapterSpec:
    """An adapter of the layers [first, last) in files."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {layer: folder / f"{name}.{layer}.safetensors" for layer in range(first, last)}
    for layer, path in layers.items():
        path.write_bytes(write_layer(random_pairs(seed, layer, targets, rank=rank)))
    return AdapterSpec(
        name=name, first=first, last=last, rank=rank, alpha=ALPHA, targets=tuple(targets), layers=layers
    )


class Shelf:
    """A content store, and where everybody fetches from."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="meshnode-shelf-")
        self.held: dict[Cid, bytes] = {}
        self.pinned: dict[Cid, str] = {}
        self.asked: list[Cid] = []  # by `block` and `open`
        self.held_up: trio.Event | None = None  # files wait for it

    def add_file(self, source: Path, *, pin: str) -> Cid:
        data = source.read_bytes()
        cid = cid_of(RAW, data)
        self.held[cid] = data
        self.pinned[cid] = pin
        return cid

    def put_block(self, data: bytes, codec: int) -> Cid:
        cid = cid_of(codec, data)
        self.held[cid] = data
        return cid

    def pin(self, cid: Cid, name: str) -> None:
        self.pinned[cid] = name

    def read(self, file: FileRef) -> bytes:
        assert len(self.held[file.cid]) == file.size
        return self.held[file.cid]

    def path(self, file: FileRef) -> Path:
        path = Path(self._folder.name) / file.cid
        path.write_bytes(self.held[file.cid])
        return path

    async def block(self, cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        self.asked.append(cid)
        if cid not in self.held:
            raise ContentUnavailable("nobody gave it within 30 s", cid=cid)
        return self.held[cid]

    async def open(self, file: FileRef) -> OpenFile:
        if self.held_up is not None:
            await self.held_up.wait()
        await self.block(file.cid)
        return OpenFile(self.path(file))

    def build(self, frame: Frame, seed: int) -> Cid:
        """A random adapter that is there to be fetched."""
        vector = np.random.default_rng(seed).standard_normal(frame.parameters).astype(np.float32)
        return build_adapter(frame, vector, self, version=seed, pin="adapters")

    def whole(self, frame: Frame, cid: Cid) -> AdapterSpec:
        """All layers of an adapter, as an engine takes them."""
        manifest = decode_adapter(self.held[cid])
        return AdapterSpec(
            name=cid,
            first=frame.first,
            last=frame.last,
            rank=frame.rank,
            alpha=frame.alpha,
            targets=tuple(target.name for target in frame.targets),
            layers={layer: self.path(file) for layer, file in manifest.files(frame.first, frame.last).items()},
        )
