"""The files of an adapter's layers, as they are served."""

from __future__ import annotations

import numpy as np

from meshnode.model.adapter import layer_files
from meshnode.model.adapter_file import read_layer
from protocols.delta.frame import Frame, Target
from protocols.ids import DAG_CBOR, cid_of


def test_each_layer_has_its_part_of_the_vector() -> None:
    frame = Frame(
        base=cid_of(DAG_CBOR, b"x"), rank=2, alpha=4, targets=(Target("q_proj", 3, 5),), first=4, last=6, seed=1
    )
    vector = np.arange(frame.parameters, dtype=np.float32)
    files = dict(layer_files(frame, vector))
    assert list(files) == [4, 5]
    pair = read_layer(files[5], 2)["q_proj"]
    assert np.array_equal(pair.a, vector[16:22].reshape(2, 3))
    assert np.array_equal(pair.b, vector[22:32].reshape(5, 2))
