"""A trial of the engine on this device: a real child process, a toy model, one token whose value is known.

The toy model has one layer that hands its input on, and a head that names the token after the last one. Its head is
the int4 matrix product of onnxruntime, the kernel that a served model spends its time in, so a processor or a
build of onnxruntime that can't run it is found out here.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Final

import numpy as np
import trio

from meshnode.core.errors import Declined, EngineLost, ModelError
from meshnode.engine.port import StageSpec
from meshnode.engine.process import Deadlines, EngineProcess
from protocols.errors import RemoteProtocolError
from protocols.ids import SESSION_BYTES, SessionId
from protocols.manifest.messages import Architecture
from protocols.pipe.messages import Sampling

VOCABULARY: Final = 16
_HIDDEN: Final = 32  # one block of the int4 kernel
_CONTEXT: Final = 64  # as many rows as an engine measures itself with
_PROMPT: Final = (3, 1, 4)
_SECONDS: Final = 60.0  # a slow device reads onnxruntime from a cold disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of it. `problem` is a sentence, empty when the token was right."""

    kind: str  # "onnx" or "null"
    took_ms: int = 0
    rss_bytes: int = 0
    confined: tuple[str, ...] = ()  # parts of the engine's confinement that hold
    problem: str = ""


async def try_engine(kind: str) -> Trial:
    """Start an engine, ask it for one token, stop it: a second or two. What goes wrong is in the answer."""
    began = perf_counter_ns()
    with tempfile.TemporaryDirectory(prefix="meshnode-trial-") as name:
        try:
            spec = _spec(kind, Path(name))
            engine = EngineProcess(spec, deadlines=Deadlines(load=_SECONDS))
            report = await engine.start()
            try:
                token, rss = await _ask(engine), engine.rss_bytes
            finally:
                await engine.stop()
        except (EngineLost, ModelError, Declined, RemoteProtocolError, OSError, ImportError) as error:
            return Trial(kind=kind, problem=str(error))
    took_ms = (perf_counter_ns() - began) // 1_000_000
    wanted = _expected(kind)
    if token != wanted:
        return Trial(kind=kind, took_ms=took_ms, problem=f"It computed the token {token}; {wanted} is the right one.")
    return Trial(kind=kind, took_ms=took_ms, rss_bytes=rss, confined=report.confined)


async def _ask(engine: EngineProcess) -> int | None:
    session = SessionId(bytes(SESSION_BYTES))
    prompt = np.array(_PROMPT, "<i4")
    await engine.open(session, first=0, last=1, capacity=_CONTEXT, sampling=Sampling(seed=0), prompt=tuple(_PROMPT))
    result = await engine.step(
        session, position=0, rows=len(_PROMPT), data=prompt.tobytes(), sample=True, prefill=True
    )
    await engine.close(session)
    return result.token


def _expected(kind: str) -> int:
    if kind == "onnx":
        return (_PROMPT[-1] + 1) % VOCABULARY
    from meshnode.engine.null_stage import NullStage

    track = NullStage(layers=1, hidden=_HIDDEN, vocab=VOCABULARY).open(0, 1, _CONTEXT)
    return int(track.run(0, np.array(_PROMPT, "<i4"), prefill=True, wanted=True).argmax())


def _spec(kind: str, folder: Path) -> StageSpec:
    graph, weights = folder / "graph.onnx", folder / "weights.safetensors"
    if kind == "onnx":
        _write_model(graph, weights)
    return StageSpec(
        kind=kind,
        graph=graph,
        groups={"embed": weights, "layer.0": weights, "head": weights} if kind == "onnx" else {},
        first=0,
        last=1,
        architecture=Architecture(
            family="trial",
            layers=1,
            hidden=_HIDDEN,
            heads=1,
            kv_heads=1,
            head_dim=8,
            vocab=VOCABULARY,
            context=_CONTEXT,
            bos_ids=(),
            eos_ids=(),
        ),
        threads=1,
        max_sessions=1,
        max_kv_bytes=1 << 20,
    )


def _write_model(graph: Path, weights: Path) -> None:
    """The weightless graph and one group file that serves all three groups, laid out as in a published model."""
    from onnx import TensorProto, helper

    table = np.eye(VOCABULARY, _HIDDEN, dtype="<f4")  # token -> one-hot row
    nibbles = np.full((VOCABULARY, _HIDDEN), 8, np.uint8)  # 8 stands for zero
    for token in range(VOCABULARY):
        nibbles[(token + 1) % VOCABULARY, token] = 15
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4)[:, None, :]  # (outputs, blocks, bytes of a block)
    scales = np.ones(VOCABULARY, "<f4")
    tensors = {"embed.weight": table, "head.weight": packed, "head.scales": scales}

    header: dict[str, object] = {}
    offset = 0
    names = {"float32": "F32", "uint8": "U8"}
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    weights.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(a.tobytes() for a in tensors.values()))

    initializers = []
    offset = 8 + len(head)
    for name, array in tensors.items():
        kind = TensorProto.FLOAT if array.dtype.name == "float32" else TensorProto.UINT8
        tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
        group = name.partition(".")[0]
        for key, value in (("location", group), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
        offset += array.nbytes

    rows = [1, "rows", _HIDDEN]
    past, present = [1, 1, "past", 8], [1, 1, "present", 8]
    nodes = [
        helper.make_node("Gather", ["embed.weight", "input_ids"], ["hidden"]),
        helper.make_node("Identity", ["hidden"], ["hidden_states.0"]),
        *(
            helper.make_node("Identity", [f"past_key_values.0.{part}"], [f"present.0.{part}"])
            for part in ("key", "value")
        ),
        helper.make_node(
            "MatMulNBits",
            ["hidden_states.0", "head.weight", "head.scales"],
            ["logits"],
            domain="com.microsoft",
            K=_HIDDEN,
            N=VOCABULARY,
            bits=4,
            block_size=32,
            accuracy_level=4,
        ),
    ]
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "trial",
        [
            value("input_ids", TensorProto.INT64, [1, "rows"]),
            *(value(f"past_key_values.0.{part}", TensorProto.FLOAT, past) for part in ("key", "value")),
        ],
        [
            value("hidden_states.0", TensorProto.FLOAT, rows),
            *(value(f"present.0.{part}", TensorProto.FLOAT, present) for part in ("key", "value")),
            value("logits", TensorProto.FLOAT, [1, "rows", VOCABULARY]),
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph.write_bytes(helper.make_model(body, ir_version=10, opset_imports=opsets).SerializeToString())


def try_engines() -> tuple[Trial, ...]:
    """Both kinds, one after the other. Blocking."""

    async def both() -> tuple[Trial, ...]:
        return tuple([await try_engine(kind) for kind in ("null", "onnx")])

    return trio.run(both)
