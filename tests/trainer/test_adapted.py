"""What the trainer computes, beside explicit arithmetic and beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshnode.core.errors import BadRequest, ModelError
from meshnode.trainer.adapted import AdaptedModel
from meshnode.trainer.base import load_base
from meshnode.trainer.evaluation import Questions
from meshnode.trainer.gradient import gradient_of, losses_of
from meshnode.trainer.hidden import HiddenStates
from meshnode.trainer.optimiser import AdamW
from meshnode.trainer.port import EvaluateJob, ModelFiles, Privacy, Sample
from meshnode.trainer.private import clipped_sum, drawn, noise, per_sample
from meshnode.trainer.texts import Row, Texts
from meshnode.trainer.training import batch_of
from protocols.delta.frame import Frame, Vector
from tests.trainer.tiny import HIDDEN, LAYERS, WIDTHS, frame_of, samples, tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows(files: ModelFiles) -> list[Row]:
    texts = Texts(files.tokenizer)
    return [texts.row(sample) for sample in samples(7)]


def adapted(files: ModelFiles, frame: Frame, folder: Path | None = None) -> AdaptedModel:
    hidden = HiddenStates(folder, f"{files.name} {frame.first}", HIDDEN, torch.float32)
    return AdaptedModel(load_base(files, "float32"), frame, hidden)


def some_vector(frame: Frame, seed: int = 5, size: float = 0.3) -> Vector:
    return np.random.default_rng(seed).normal(0, size, frame.parameters).astype(np.float32)


def merged(files: ModelFiles, frame: Frame, vector: Vector) -> Any:
    """The base model with W + alpha / rank * B A in the place of every W of the frame."""
    model = load_base(files, "float32")
    parts = frame.split(vector)
    for layer in range(frame.first, frame.last):
        for target in frame.targets:
            a, b = (torch.from_numpy(parts[f"layers.{layer}.{target.name}.{f}"]) for f in "AB")
            block = model.model.layers[layer]
            linear = next(m for n, m in block.named_modules() if n.endswith(target.name))
            linear.weight.data += frame.alpha / frame.rank * (b @ a)
    return model


def plain_logits(model: Any, rows: list[Row]) -> torch.Tensor:
    """One text at a time, through the whole model."""
    found = [model(torch.tensor([row.ids])).logits[0, row.first : row.first + len(row.answer)] for row in rows]
    return torch.cat(found).detach()


@pytest.mark.parametrize(("targets", "first"), [((), 2), (tuple(WIDTHS), 1), (("down_proj",), 0), ((), LAYERS - 1)])
def test_logits_are_those_of_explicit_arithmetic(
    files: ModelFiles, rows: list[Row], targets: tuple[str, ...], first: int
) -> None:
    frame = frame_of(*targets, first=first)
    vector = some_vector(frame)
    model = adapted(files, frame)
    model.set(vector)
    expected = plain_logits(merged(files, frame, vector), rows)
    bare = plain_logits(load_base(files, "float32"), rows)
    assert float((expected - bare).abs().max()) > 0.1  # the adapter does something
    for _ in range(2):  # hidden states that are computed, and those that are known
        assert torch.allclose(model.logits(rows), expected, atol=2e-5)


def test_at_its_start_an_adapter_changes_nothing(files: ModelFiles, rows: list[Row]) -> None:
    model = adapted(files, frame_of())
    bare = plain_logits(load_base(files, "float32"), rows)
    assert torch.allclose(model.logits(rows), bare, atol=2e-5)
    model.set(some_vector(frame_of()))
    assert not torch.allclose(model.logits(rows), bare, atol=1e-2)
    base = model.detach()
    assert torch.allclose(plain_logits(base, rows), bare, atol=2e-5)


def test_a_head_of_its_own_and_bfloat16(tmp_path: Path) -> None:
    files = tiny_model(tmp_path, tied=False)
    assert set(files.groups) == {"embed", "head", *(f"layer.{k}" for k in range(LAYERS))}
    texts = Texts(files.tokenizer)
    rows = [texts.row(sample) for sample in samples(3)]
    exact = adapted(files, frame_of()).logits(rows)
    hidden = HiddenStates(None, "", HIDDEN, torch.bfloat16)
    rough = AdaptedModel(load_base(files, "bfloat16"), frame_of(), hidden).logits(rows)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).detach().abs().max()) < 0.1 * float(exact.detach().std())


def test_what_is_written_into_the_vector_counts(files: ModelFiles, rows: list[Row]) -> None:
    frame = frame_of()
    model = adapted(files, frame)
    vector = some_vector(frame)
    model.vector.copy_(torch.from_numpy(vector))
    other = adapted(files, frame)
    other.set(vector)
    assert torch.equal(model.logits(rows), other.logits(rows))


def test_hidden_states_are_kept_across_processes(files: ModelFiles, rows: list[Row], tmp_path: Path) -> None:
    first = adapted(files, frame_of(), tmp_path)
    expected = first.logits(rows)
    first._hidden.close()
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    again = adapted(files, frame_of(), tmp_path)
    again._below = pytest.fail  # type: ignore[assignment,method-assign]
    assert torch.equal(again.logits(rows), expected)
    again._hidden.close()
    for injured in (whole[:-3], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b"", b"\xff" * 50):
        kept.write_bytes(injured)
        model = adapted(files, frame_of(), tmp_path)
        assert torch.allclose(model.logits(rows), expected, atol=2e-5)  # other texts are computed together
        model._hidden.close()


def test_a_second_trainer_computes_for_itself(files: ModelFiles, rows: list[Row], tmp_path: Path) -> None:
    first, second = (adapted(files, frame_of(), tmp_path) for _ in range(2))
    assert torch.equal(first.logits(rows), second.logits(rows))


def test_the_gradient_is_the_slope_of_the_loss(files: ModelFiles, rows: list[Row]) -> None:
    frame = frame_of()
    model = adapted(files, frame)
    vector = some_vector(frame)
    model.set(vector)
    names = [name for name, _ in frame.tensors]
    gradient, loss = gradient_of(model, rows, names)
    direction = some_vector(frame, seed=9, size=1.0)
    ends = []
    for sign in (-1, 1):
        model.set(vector + np.float32(sign * 1e-3) * direction)
        ends.append(float(losses_of(model, rows).mean().detach()))
    slope = float(gradient @ torch.from_numpy(direction))
    assert slope == pytest.approx((ends[1] - ends[0]) / 2e-3, rel=0.02)
    assert min(ends) < loss < max(ends)


def test_only_what_moves_has_a_gradient(files: ModelFiles, rows: list[Row]) -> None:
    frame = frame_of()
    model = adapted(files, frame)
    model.set(some_vector(frame))
    gradient, _ = gradient_of(model, rows, [name for name, _ in frame.tensors if name.endswith(".B")])
    for name, part in frame.split(gradient.numpy()).items():
        assert bool(np.any(part)) == name.endswith(".B")


def places_of(frame: Frame) -> dict[str, slice]:
    at, out = 0, {}
    for name, (height, width) in frame.tensors:
        out[name] = slice(at, at + height * width)
        at += height * width
    return out


def test_gradients_of_single_samples_are_those_of_single_passes(files: ModelFiles, rows: list[Row]) -> None:
    frame = frame_of("q_proj", "v_proj", "down_proj", first=1)
    model = adapted(files, frame)
    model.set(some_vector(frame))
    places = places_of(frame)
    each, losses = per_sample(model, rows, places)
    for i, row in enumerate(rows):
        expected, loss = gradient_of(model, [row], list(places))
        together = torch.cat([each[name][i] for name in places])
        assert torch.allclose(together, expected, atol=1e-5 * float(expected.abs().max()) + 1e-7)
        assert losses[i] == pytest.approx(loss, rel=1e-5)


def test_no_sample_counts_more_than_the_clip(files: ModelFiles, rows: list[Row]) -> None:
    frame = frame_of()
    model = adapted(files, frame)
    model.set(some_vector(frame))
    places = places_of(frame)
    singles = [gradient_of(model, [row], list(places))[0] for row in rows]
    norms = [float(g.norm()) for g in singles]
    clip = sorted(norms)[len(norms) // 2]  # cuts half of them
    expected = sum((g * min(1.0, clip / n) for g, n in zip(singles, norms, strict=True)), torch.zeros(()))
    found, _ = clipped_sum(model, rows, places, Privacy(clip=clip, sigma=0))
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(clipped_sum(model, rows[:1], places, Privacy(clip=0.01, sigma=0))[0].norm()) <= 0.01 * (1 + 1e-5)


def test_noise_and_choice_are_what_the_accountant_counts_on() -> None:
    values = noise(200_000, 1.5)
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1.5) < 0.02
    assert not torch.equal(values, noise(200_000, 1.5))
    sizes = np.array([len(drawn(1000, 0.032)) for _ in range(400)])
    assert abs(sizes.mean() - 32) < 2 and abs(sizes.var() - 1000 * 0.032 * 0.968) < 10  # binomial


def test_adamw_is_that_of_torch() -> None:
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(3, 2))]
    vector = torch.cat([p.detach().reshape(-1) for p in theirs])
    places = {"a": slice(0, 5), "b": slice(5, 11)}
    ours = AdamW(places, torch.zeros(11), torch.zeros(11), {}, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    for step in range(7):
        gradient = torch.randn(11)
        moving = [name for k, name in enumerate(places) if step % 3 != k]  # sometimes one stands still
        for name, p in zip(places, theirs, strict=True):
            p.grad = gradient[places[name]].view_as(p).clone() if name in moving else None
        reference.step()
        ours.step(vector, gradient, 0.02, moving)
    assert torch.allclose(vector, torch.cat([p.detach().reshape(-1) for p in theirs]), atol=1e-6)


def test_batches_take_every_sample_once_before_one_comes_again() -> None:
    taken = [i for step in range(9) for i in batch_of(12, 4, 7, step)]
    for epoch in range(3):
        assert sorted(taken[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert taken[:12] != taken[12:24]
    assert sorted(set(batch_of(3, 8, 0, 0))) == [0, 1, 2]  # fewer samples than a batch


def evaluation(files: ModelFiles, **changes: Any) -> EvaluateJob:
    given: dict[str, Any] = {"samples": samples(9), "adapters": (None,), "frame": frame_of(), "compute": "float32"}
    return EvaluateJob(model=files, **{**given, **changes})


def judged(files: ModelFiles, job: EvaluateJob) -> Any:
    return Questions(job, Texts(files.tokenizer)).judge(adapted(files, job.frame).logits)


def test_scores_are_log_probabilities(files: ModelFiles, rows: list[Row]) -> None:
    found = judged(files, evaluation(files, samples=samples(7)))
    likely = torch.log_softmax(plain_logits(load_base(files, "float32"), rows), dim=1).numpy()
    assert found.labels == ("blue", "green", "red")
    texts = Texts(files.tokenizer)
    ids = [texts.answer("", label)[0] for label in found.labels]
    assert np.allclose(found.scores, likely[:, ids], atol=1e-4)
    expected = [-likely[i, row.answer[0]] for i, row in enumerate(rows)]
    assert np.allclose(found.losses, expected, atol=1e-4)
    right = [found.labels.index(sample.label) for sample in samples(7)]
    assert np.array_equal(found.right, found.scores.argmax(axis=1) == right)
    assert found.accuracy == pytest.approx(np.mean(found.right)) and found.loss == pytest.approx(np.mean(expected))


def test_labels_that_begin_alike_are_scored_whole(files: ModelFiles) -> None:
    said = tuple(Sample(s.input, f"very {s.label}" if s.label != "red" else "very old red") for s in samples(6))
    found = judged(files, evaluation(files, samples=said))
    texts, base = Texts(files.tokenizer), load_base(files, "float32")
    for i, sample in enumerate(said):
        for k, label in enumerate(found.labels):
            row = texts.row(sample, label)
            likely = torch.log_softmax(plain_logits(base, [row]), dim=1)
            total = float(likely[torch.arange(len(row.answer)), torch.tensor(row.answer)].sum())
            assert found.scores[i, k] == pytest.approx(total, abs=1e-4)
            if label == sample.label:
                assert found.losses[i] == pytest.approx(-total / len(row.answer), abs=1e-4)


def test_what_can_not_be_judged_is_said(files: ModelFiles) -> None:
    for changes, words in (
        ({"samples": ()}, "needs samples"),
        ({"labels": ("red", "red")}, "each once"),
        ({"labels": ("red", "green")}, "'blue', which is none of the labels"),
        ({"max_tokens": 4}, "tokens; at most 4"),
        ({"samples": (Sample("the sky is", ""),)}, "label"),
    ):
        with pytest.raises(BadRequest, match=words):
            judged(files, evaluation(files, **changes))


def test_a_frame_of_another_model_is_refused(files: ModelFiles) -> None:
    from dataclasses import replace

    from protocols.delta.frame import Target

    frame = frame_of()
    for other, words in (
        (replace(frame, last=LAYERS + 1), "the model has 4"),
        (replace(frame, targets=(Target("q_proj", HIDDEN, HIDDEN + 1),)), "32 inputs and 33 outputs"),
    ):
        with pytest.raises(ModelError, match=words):
            adapted(files, other)


def test_files_of_another_model_are_refused(files: ModelFiles, tmp_path: Path) -> None:
    from dataclasses import replace

    config = files.config.read_text()
    for found, new, words in (
        ('"hidden_size": 32', '"hidden_size": 64', "is not one that the model"),
        ('"num_hidden_layers": 4', '"num_hidden_layers": 5', "lacks the weight model.layers.4"),
        ('"num_hidden_layers": 4', '"num_hidden_layers": 3', "model.layers.3"),
        ('"llama"', '"unheard-of"', "configuration"),
    ):
        (tmp_path / "config.json").write_text(config.replace(found, new))
        with pytest.raises(ModelError, match=words):
            load_base(replace(files, config=tmp_path / "config.json"), "float32")
    (tmp_path / "index").write_text('{"format": "meshnode-train/2", "groups": {}}')
    with pytest.raises(ModelError, match="none of the format"):
        load_base(replace(files, index=tmp_path / "index"), "float32")
    (tmp_path / "cut").write_bytes(files.groups["layer.1"].read_bytes()[:-9])
    with pytest.raises(ModelError, match="can't be read"):
        load_base(replace(files, groups={**files.groups, "layer.1": tmp_path / "cut"}), "float32")


def test_texts_are_read_as_questions_are(files: ModelFiles) -> None:
    texts = Texts(files.tokenizer)
    row = texts.row(Sample("the sky is", "very blue"))
    assert row.ids[0] == 1 and row.ids[1] != 1  # <s>, once
    assert row.ids == texts.row(Sample("<s> the sky is", "very blue")).ids
    assert len(row.answer) == 2 and row.ids[-1] == row.answer[0] and row.first == 3
