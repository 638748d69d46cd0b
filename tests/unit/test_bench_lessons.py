"""What benchmarks of learning train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshnode.bench.lessons import TRIALS, frame_for
from meshnode.core.errors import ModelError
from protocols.delta.frame import FACTORS, Target, decode_frame, encode_frame


def published(folder: Path, **config: int) -> Path:
    shape = {"hidden": 12, "layers": 7, "heads": 3, "kv_heads": 1, "head_dim": 4}
    (folder / "index.json").write_text(json.dumps({"architecture": shape}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_upper_third_of_a_published_model(tmp_path: Path) -> None:
    frame = frame_for(published(tmp_path, intermediate_size=20), ("down_proj", "q_proj", "v_proj"), 5)
    assert (frame.first, frame.last) == (5, 7)
    assert frame.targets == (Target("q_proj", 12, 12), Target("v_proj", 12, 4), Target("down_proj", 20, 12))


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("task", TRIALS)
def test_every_trial_has_a_frame(tmp_path: Path, task: str, factors: str) -> None:
    frame = frame_for(published(tmp_path, intermediate_size=20), TRIALS[task].targets, 1, factors)
    assert decode_frame(encode_frame(frame)) == frame
    assert frame.factors == factors


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no published model that could learn here"):
        frame_for(tmp_path, ("q_proj",), 0)
    with pytest.raises(ModelError, match="intermediate_size"):
        frame_for(published(tmp_path), ("q_proj",), 0)
