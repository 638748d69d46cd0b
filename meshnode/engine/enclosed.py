"""A stage whose process has given up everything else.

Files are opened, then rights are given up, then it is looked at what the files hold. What came from others is opened
but not read before the confinement (`core/confinement`); libraries that may start threads are imported between its
two steps.
"""

from __future__ import annotations

import os
from typing import Final

from meshnode.core.confinement.confine import Held, confine, libraries_only
from meshnode.engine.backend import Stage
from meshnode.policy.chunking import CHUNK_ROWS
from protocols.enginewire.messages import Load
from protocols.errors import RemoteProtocolError

# Writable memory of SmolLM2-135M beside its weight files: 1.9 times as much as they are in int4, 1.6 in int8, 1.0 in
# fp32 (packed copies for the kernels), 2.3 in fp32 when sessions have split the span twice.
_WEIGHT_COPIES: Final = 3
_WORK_BYTES: Final = 1 << 29  # 256 rows through 30 layers took 50 MB, 4096 rows 380 MB
_SHARE: Final = 2  # of the device's memory a long context may take to work in at most half


def open_enclosed(load: Load) -> tuple[Stage, Held]:
    """Confine this process and open the span. Once, on the main thread. Raises ModelError, RemoteProtocolError."""
    if load.kind == "null":
        from meshnode.engine.null_stage import NullStage

        held = confine(memory_bytes=memory_bound(load, 0))
        return NullStage(layers=load.layers, hidden=load.hidden, vocab=load.vocab), held
    if load.kind != "onnx":
        raise RemoteProtocolError(f"there is no engine of the kind {load.kind!r}; known are onnx and null")
    from meshnode.engine.model_files import ModelFiles

    files = ModelFiles(load)
    libraries_only()
    from meshnode.engine.onnx_stage import OnnxStage
    from meshnode.engine.runtime import warm_up

    warm_up()
    held = confine(memory_bytes=memory_bound(load, files.weights.size), mapped_bytes=files.weights.size)
    return OnnxStage(load, files), held


def memory_bound(load: Load, weight_bytes: int) -> int:
    """Bytes of writable memory that an honest model of this shape stays below.

    Weights and KV are what the node has promised. Attention may want a number for every row, head and position; that
    is the manifest's word, so it counts up to a part of the device.
    """
    device = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    attention = min(4 * CHUNK_ROWS * load.heads * load.context, device // _SHARE)
    return _WEIGHT_COPIES * weight_bytes + min(load.max_kv_bytes, device) + _WORK_BYTES + attention
