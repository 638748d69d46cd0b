"""onnxruntime, with its telemetry off, and everything that it finds out about the processor found out.

From 1.29 on its Linux builds tell their maker what models they open, and on what, from a thread that starts with the
import, unless this variable is set before. Nobody else imports onnxruntime.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import onnxruntime as ort

__all__ = ["ort", "warm_up"]


def warm_up() -> None:
    """Open and run a small graph of our own: on some processors its kernels are chosen by files of the system, which
    can't be opened any more when the first foreign graph is."""
    value = onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.eye(32, dtype=np.float32), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "warm-up",
        [value("x", onnx.TensorProto.FLOAT, [2, 32])],
        [value("y", onnx.TensorProto.FLOAT, [2, 32])],
        [weight],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones((2, 32), np.float32)})
