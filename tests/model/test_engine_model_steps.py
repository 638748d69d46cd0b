"""The demonstration model in any cuts, through any chunks, windows and rewinds: the same bits."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.bench.single import stage_spec
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.requests import load_request
from tests.long import some
from tests.model.real_mesh import LAYERS, alone, model_folder
from tests.property.step_scripts import scripts, segmentations

pytestmark = [pytest.mark.model, pytest.mark.slow]


@cache
def cut_on_demand(variant: str) -> OnnxStage:
    """Another engine than that of `alone`, which is never asked for a part of the layers."""
    return OnnxStage(load_request(stage_spec(model_folder(variant), variant)))


@pytest.mark.parametrize("variant", some(["int4", "int8"], "int4"))
@settings(max_examples=6)
@given(data=st.data())
def test_only_the_class_of_a_row_decides(variant: str, data: st.DataObject) -> None:
    script = data.draw(scripts(320))
    cuts = data.draw(segmentations(LAYERS))
    tokens = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 49152, script.length + 1, np.int32)
    chain = [cut_on_demand(variant).open(a, b, script.length + 1) for a, b in pairwise(cuts)]
    whole = [alone(variant).stage.open(0, LAYERS, script.length + 1)]
    script.check(whole, chain, tokens)


@pytest.mark.parametrize("variant", ["int4", "int8"])
def test_the_two_classes_differ(variant: str) -> None:
    """Or the rule above would say nothing: one row alone is another kernel than the same row of a prompt."""
    tokens = np.random.default_rng(5).integers(0, 49152, 40, np.int32)
    track = alone(variant).stage.open(0, LAYERS, len(tokens))
    whole = track.run(0, tokens, prefill=True, wanted=True).copy()
    track.run(0, tokens[:-1], prefill=True, wanted=False)
    assert not np.array_equal(track.run(39, tokens[-1:], prefill=False, wanted=True), whole)
