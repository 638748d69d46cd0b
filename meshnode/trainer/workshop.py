"""Carries out jobs, and keeps what the next one will need: the base model, the factors of a frame, the tokenizer.

Runs in the trainer only.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meshnode.core.errors import BadRequest, DiskError, ModelError
from meshnode.publisher.words import first_line
from meshnode.trainer.adapted import AdaptedModel
from meshnode.trainer.base import load_base
from meshnode.trainer.evaluation import Questions
from meshnode.trainer.hidden import HiddenStates
from meshnode.trainer.local import ADAPTER, LocalModel, train_locally
from meshnode.trainer.port import EvaluateJob, Evaluation, LocalJob, ModelFiles, Step, TrainJob
from meshnode.trainer.texts import Row, Texts, short_enough
from meshnode.trainer.training import STATE, train
from meshnode.trainer.wire import VECTOR, Job, Json, evaluations_to_files, identity_of, write_vector
from protocols.delta.frame import Frame

Report = Callable[[Step], None]


class Workshop:
    """One model at a time."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\b")
        self._name: tuple[str, str] | None = None  # of the model, and the type in which it computes
        self._base: Any = None
        self._texts: Texts | None = None
        self._frame: tuple[Frame, Path | None] | None = None
        self._adapted: AdaptedModel | None = None
        self._hidden: HiddenStates | None = None

    def carry_out(self, job: Job, folder: Path, report: Report) -> Json:
        """What is said when it is done; `folder` is for files. Raises ModelError, BadRequest, DiskError."""
        try:
            match job:
                case TrainJob():
                    return self._train(job, report)
                case LocalJob():
                    return self._train_locally(job, report)
                case EvaluateJob():
                    return self._evaluate(job, folder)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise ModelError(f"torch failed with this model: {type(error).__name__}: {first_line(error)}.") from error

    def _train(self, job: TrainJob, report: Report) -> Json:
        texts = self._open(job.model, job.compute)
        rows, skipped = _rows(texts, job)
        model = self._adapt(job.frame, job.cache, job.model.name, job.compute)
        _make(job.folder)
        outcome = train(model, job, identity_of(job), rows, report)
        write_vector(job.folder / VECTOR, model.vector.numpy())
        losses = [None if loss != loss else loss for loss in outcome.losses]
        return {
            "optimiser": str(job.folder / STATE),
            "losses": losses,
            "seconds": outcome.seconds,
            "skipped": skipped,
            "resumed": outcome.resumed,
        }

    def _train_locally(self, job: LocalJob, report: Report) -> Json:
        texts = self._open(job.model, job.compute)
        rows, skipped = _rows(texts, job)
        self._strip()
        _make(job.folder)
        model = LocalModel.fresh(self._base, job)
        try:
            outcome = train_locally(model, job, identity_of(job), rows, report)
        finally:
            self._base = model.detach()
        return {
            "adapter": str(job.folder / ADAPTER),
            "losses": outcome.losses,
            "seconds": outcome.seconds,
            "skipped": skipped,
            "resumed": outcome.resumed,
        }

    def _evaluate(self, job: EvaluateJob, folder: Path) -> Json:
        questions = Questions(job, self._open(job.model, job.compute))
        found = [self._judged(questions, job, adapter) for adapter in job.adapters]
        return evaluations_to_files(found, folder)

    def _judged(self, questions: Questions, job: EvaluateJob, adapter: Any) -> Evaluation:
        if isinstance(adapter, Path):
            self._strip()
            local = LocalModel.saved(self._base, adapter)
            try:
                return questions.judge(local.logits)
            finally:
                self._base = local.detach()
        model = self._adapt(job.frame, job.cache, job.model.name, job.compute)
        model.set(job.frame.initial() if adapter is None else adapter)  # at its start an adapter changes nothing
        return questions.judge(model.logits)

    def _open(self, files: ModelFiles, compute: str) -> Texts:
        if self._name != (files.name, compute) or self._texts is None:
            self._strip()
            self._name, self._base = None, None  # before the next one is loaded
            self._texts = Texts(files.tokenizer)
            self._base = load_base(files, compute)
            self._name = (files.name, compute)
        return self._texts

    def _adapt(self, frame: Frame, cache: Path | None, name: str, compute: str) -> AdaptedModel:
        if self._adapted is None or self._frame != (frame, cache):
            self._strip()
            owner = f"{name} {frame.first} {compute}"
            kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[compute]
            width = self._base.config.get_text_config().hidden_size
            self._hidden = HiddenStates(cache, owner, width, kind)
            self._adapted = AdaptedModel(self._base, frame, self._hidden)
            self._frame = (frame, cache)
        return self._adapted

    def _strip(self) -> None:
        """Take off what the base model has on."""
        if self._adapted is not None:
            self._base = self._adapted.detach()
            self._adapted = None
        if self._hidden is not None:
            self._hidden.close()
            self._hidden = None


def _rows(texts: Texts, job: TrainJob | LocalJob) -> tuple[list[Row], int]:
    """The samples that are short enough, and how many are not."""
    if not job.samples or job.batch < 1 or job.steps < 0:
        raise BadRequest("A job of training needs samples, a batch of one at least, and steps.")
    rows = [texts.row(sample) for sample in job.samples]
    kept = short_enough(rows, job.max_tokens)
    return kept, len(rows) - len(kept)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder} can't be made: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK):
        raise DiskError(f"{folder} can't be written.")
