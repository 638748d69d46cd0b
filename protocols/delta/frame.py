"""What all adapters of one lineage share: which layers get factors, of which shape, from which start. See SPEC.md.

An adapter is the factors A and B of every target of a frame as one flat float32 vector (LoRA, arXiv 2106.09685):
y = W x + alpha / rank * B (A x), A (rank, inputs), B (outputs, rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocols.dag_cbor import (
    Wrong,
    a_map,
    an_int,
    dumps,
    link_from_wire,
    link_to_wire,
    loads,
    written,
)
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_codec, cid_of
from protocols.manifest.messages import MAX_LAYERS

Vector = npt.NDArray[np.float32]  # one dimension

SCHEMA: Final = 1
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BOTH, ALTERNATING, B_ALONE = "both", "alternating", "b"
FACTORS: Final = (BOTH, ALTERNATING, B_ALONE)

MAX_FRAME_BYTES: Final = 4096  # seven targets take about 500
MAX_RANK: Final = 256
MAX_ALPHA: Final = 4096
MAX_WIDTH: Final = 1 << 20  # of a linear layer
MAX_PARAMETERS: Final = 1 << 26  # 256 MiB as float32: all linear layers of a model of 8 billion, at rank 16
MAX_SEED: Final = (1 << 63) - 1
MAX_PERIOD: Final = 1 << 20

_FIELDS: Final = ("schema", "base", "rank", "alpha", "targets", "first", "last", "seed", "factors", "period")


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that gets a pair of factors, in every layer of the frame."""

    name: str  # one of TARGETS
    inputs: int  # K
    outputs: int  # N


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The shape and the start of the adapters of one lineage. Its CID is the name of that lineage."""

    base: Cid  # the manifest of the release that is adapted
    rank: int
    alpha: int
    targets: tuple[Target, ...]  # in the order of TARGETS
    first: int  # layers [first, last) have factors
    last: int
    seed: int  # of the initial A
    factors: str = BOTH  # which are trained: both, one in turn (B first), or B alone
    period: int = 1  # rounds until the other factor's turn, when alternating

    @property
    def cid(self) -> Cid:
        """Raises LocalProtocolError for a frame that can't be written."""
        return cid_of(DAG_CBOR, encode_frame(self))

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied with."""
        return self.alpha / self.rank

    @property
    def tensors(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """Name and shape of each tensor in the order of the vector: "layers.7.q_proj.A" (rank, inputs), then
        "layers.7.q_proj.B" (outputs, rank), layer by layer."""
        return tuple(
            (f"layers.{layer}.{target.name}.{factor}", shape)
            for layer in range(self.first, self.last)
            for target in self.targets
            for factor, shape in (("A", (self.rank, target.inputs)), ("B", (target.outputs, self.rank)))
        )

    @property
    def parameters(self) -> int:
        """Length of an adapter's vector."""
        return (self.last - self.first) * self.rank * sum(t.inputs + t.outputs for t in self.targets)

    def trained(self, round_number: int) -> tuple[str, ...]:
        """The factors that are trained in this round, counted from 1: ("A", "B"), ("A",) or ("B",).

        B comes first: while it is zero, nothing depends on A.
        """
        if self.factors == BOTH:
            return ("A", "B")
        return ("A",) if self.factors == ALTERNATING and (round_number - 1) // self.period % 2 else ("B",)

    def initial(self) -> Vector:
        """The adapter that changes nothing: B is zero, A uniform in ±1/sqrt(inputs).

        The numbers are the doubles in [0, 1) that the upper 53 bits of each output of NumPy's PCG64(seed) make, in
        the order of the tensors; NumPy keeps that stream the same in all its versions.
        """
        stream = np.random.PCG64(self.seed)
        vector = np.zeros(self.parameters, np.float32)
        for name, tensor in self.split(vector).items():
            if name.endswith(".A"):
                rank, inputs = tensor.shape
                unit = (stream.random_raw(rank * inputs) >> np.uint64(11)) * 2.0**-53
                tensor[:] = ((2.0 * unit - 1.0) / np.sqrt(inputs)).reshape(rank, inputs)
        return vector

    def split(self, vector: Vector) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors of an adapter by name, as views into its vector.

        Raises:
          LocalProtocolError: not a vector of `parameters` float32.
        """
        if vector.dtype != np.float32 or vector.shape != (self.parameters,):
            raise LocalProtocolError(
                f"An adapter of this frame is {self.parameters} float32 in a row, not {vector.dtype} {vector.shape}."
            )
        parts, at = {}, 0
        for name, shape in self.tensors:
            end = at + shape[0] * shape[1]
            parts[name] = vector[at:end].reshape(shape)
            at = end
        return parts


def encode_frame(frame: Frame) -> bytes:
    """The block that the frame's CID names.

    Raises:
      LocalProtocolError: a field breaks its limit.
    """

    def work() -> bytes:
        raw = _to_wire(frame)
        _from_wire(raw)
        return dumps(raw)

    return written(work, "a frame", MAX_FRAME_BYTES)


def decode_frame(data: bytes) -> Frame:
    """Check a block and give its frame.

    Raises:
      RemoteProtocolError: too large, not canonical dag-cbor, a field missing, unknown or out of its limits.
    """
    if len(data) > MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"A frame of {len(data)} bytes; the limit is {MAX_FRAME_BYTES}.")
    try:
        return _from_wire(loads(bytes(data), "a frame"))
    except Wrong as wrong:
        raise RemoteProtocolError(f"A frame can't be used: {wrong}.") from None


def _to_wire(frame: Frame) -> dict[str, Any]:
    targets = [{"name": t.name, "inputs": t.inputs, "outputs": t.outputs} for t in frame.targets]
    plain = {name: getattr(frame, name) for name in _FIELDS[2:] if name != "targets"}
    return {"schema": SCHEMA, "base": link_to_wire(frame.base), "targets": targets, **plain}


def _from_wire(value: Any) -> Frame:
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise Wrong(f"a frame of the schema {str(value.get('schema'))[:20]}; this node reads schema {SCHEMA}")
    raw = a_map(value, "a frame", _FIELDS)
    base = link_from_wire(raw["base"], "base")
    if cid_codec(base) != DAG_CBOR:
        raise Wrong("base is not the CID of a manifest")
    if raw["factors"] not in FACTORS:
        raise Wrong(f"factors is {str(raw['factors'])[:40]!r}, allowed are {', '.join(FACTORS)}")
    first = an_int(raw["first"], "first", 0, MAX_LAYERS - 1)
    frame = Frame(
        base=base,
        rank=an_int(raw["rank"], "rank", 1, MAX_RANK),
        alpha=an_int(raw["alpha"], "alpha", 1, MAX_ALPHA),
        targets=_targets_from_wire(raw["targets"]),
        first=first,
        last=an_int(raw["last"], "last", first + 1, MAX_LAYERS),
        seed=an_int(raw["seed"], "seed", 0, MAX_SEED),
        factors=raw["factors"],
        period=an_int(raw["period"], "period", 1, MAX_PERIOD),
    )
    if frame.factors != ALTERNATING and frame.period != 1:
        raise Wrong(f"period is {frame.period}, but only alternating factors have one; write 1")
    if frame.parameters > MAX_PARAMETERS:
        raise Wrong(f"its adapters have {frame.parameters} parameters; the limit is {MAX_PARAMETERS}")
    return frame


def _targets_from_wire(value: Any) -> tuple[Target, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= len(TARGETS):
        raise Wrong(f"targets is not an array of 1 to {len(TARGETS)} items")
    found = []
    for item in value:
        raw = a_map(item, "a target", ("name", "inputs", "outputs"))
        if raw["name"] not in TARGETS:
            raise Wrong(f"a target is named {str(raw['name'])[:40]!r}, allowed are {', '.join(TARGETS)}")
        width = {side: an_int(raw[side], f"{raw['name']}.{side}", 1, MAX_WIDTH) for side in ("inputs", "outputs")}
        found.append(Target(raw["name"], **width))
    places = [TARGETS.index(target.name) for target in found]
    if places != sorted(set(places)):
        raise Wrong(f"targets come twice or out of order; the order is {', '.join(TARGETS)}")
    return tuple(found)
