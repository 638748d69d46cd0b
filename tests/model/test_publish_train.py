"""The variant `train` from end to end: published, read back by a trainer, and beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import ModelError
from meshnode.publisher import publish as publishing
from meshnode.trainer.port import ModelFiles
from protocols.delta.frame import TARGETS, Frame, Target
from protocols.ids import DAG_CBOR, cid_of
from tests.model.cutting import published, random_checkpoint
from tests.model.families import ARCHITECTURES

pytestmark = [pytest.mark.model, pytest.mark.slow]
FIRST = 2  # layer that is adapted


def files_of(folder: Path, index: dict[str, Any]) -> ModelFiles:
    variant = index["variants"]["train"]
    groups = {f"layer.{k}": folder / entry["path"] for k, entry in enumerate(variant["layers"])}
    groups |= {end: folder / variant[end]["path"] for end in ("embed", "head")}
    return ModelFiles(
        name=folder.name,
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        index=folder / variant["graph"]["path"],
        groups=groups,
    )


def frame_for(model: Any) -> Frame:
    """All linear layers of the upper layers of a model that has them apart."""
    layers = model.get_decoder().layers
    widths = {
        name.rpartition(".")[2]: (module.in_features, module.out_features)
        for name, module in layers[FIRST].named_modules()
        if name.rpartition(".")[2] in TARGETS
    }
    targets = tuple(Target(name, *widths[name]) for name in TARGETS if name in widths)
    base = cid_of(DAG_CBOR, b"base")
    return Frame(base=base, rank=2, alpha=8, targets=targets, first=FIRST, last=len(layers), seed=1)


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "qwen2-types", "qwen3", "gemma2", "gemma3_text", "granite"]
)
def test_a_trainer_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    """Softcaps, scales, windows and two rotations stay the model's own, also where hidden states are put in."""
    import torch

    from meshnode.trainer.adapted import AdaptedModel
    from meshnode.trainer.base import load_base
    from meshnode.trainer.hidden import HiddenStates
    from meshnode.trainer.texts import Row

    model = random_checkpoint(tmp_path / "source", family.partition("-")[0], **ARCHITECTURES[family])
    index = published(tmp_path / "source", tmp_path / "out", "int4", "train")
    assert set(index["variants"]) == {"int4", "train"}
    assert index["variants"]["train"]["quality"]["perplexity_milli"] > 0
    files = files_of(tmp_path / "out", index)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    chance = np.random.default_rng(3)
    texts = [tuple(int(t) for t in chance.integers(0, 200, size)) for size in (40, 7, 61)]
    rows = [Row(text, (1, 2)) for text in texts]
    expected = torch.cat([model(torch.tensor([row.ids])).logits[0, row.first :][:2] for row in rows]).detach()
    base = load_base(files, "float32")
    hidden = HiddenStates(None, "", base.config.get_text_config().hidden_size, torch.float32)
    adapted = AdaptedModel(base, frame_for(base), hidden)
    for _ in range(2):
        found = adapted.logits(rows).detach()
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.std())


def test_joint_matrices_have_no_factors(tmp_path: Path) -> None:
    from meshnode.trainer.adapted import AdaptedModel
    from meshnode.trainer.base import load_base
    from meshnode.trainer.hidden import HiddenStates

    random_checkpoint(tmp_path / "source", "phi3")
    index = published(tmp_path / "source", tmp_path / "out", "int4", "train")
    base = load_base(files_of(tmp_path / "out", index), "float32")
    width = base.config.hidden_size
    frame = Frame(
        base=cid_of(DAG_CBOR, b"base"),
        rank=2,
        alpha=4,
        targets=(Target("q_proj", width, width),),
        first=1,
        last=2,
        seed=1,
    )
    with pytest.raises(ModelError, match="no single linear layer q_proj in its layer 1"):
        AdaptedModel(base, frame, HiddenStates(None, "", width, base.dtype))


def test_files_that_lost_something_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read back and compared: here the end of a layer is lost."""
    random_checkpoint(tmp_path / "source", "llama")
    right = publishing.write_training_variant

    def wrong(*arguments: Any) -> dict[str, Any]:
        found = right(*arguments)
        one = tmp_path / "out" / found["layers"][0]["path"]
        data = bytearray(one.read_bytes())
        data[-4000:] = bytes(4000)
        one.unlink()
        one.write_bytes(data)
        return found

    monkeypatch.setattr(publishing, "write_training_variant", wrong)
    with pytest.raises(ModelError, match="not published in train"):
        published(tmp_path / "source", tmp_path / "out", "int4", "train")
    assert not (tmp_path / "out" / "index.json").exists()
