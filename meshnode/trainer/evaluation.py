"""How good an adapter is on samples. Runs in the trainer only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from meshnode.core.errors import BadRequest
from meshnode.trainer.port import EvaluateJob, Evaluation
from meshnode.trainer.texts import Row, Texts

_TOGETHER: Final = 32  # rows of one pass
_MOST_LABELS: Final = 256

Logits = Callable[[Sequence[Row]], torch.Tensor]  # see AdaptedModel.logits


class Questions:
    """The samples of a job, and what must be computed for them."""

    def __init__(self, job: EvaluateJob, texts: Texts) -> None:
        """Raises BadRequest: no samples, an unknown or too many labels, a sample that is too long."""
        self.labels = job.labels or tuple(sorted({sample.label for sample in job.samples}))
        if not job.samples or len(set(self.labels)) != len(self.labels) or len(self.labels) > _MOST_LABELS:
            raise BadRequest(f"Judging needs samples and at most {_MOST_LABELS} labels, each once.")
        strange = {sample.label for sample in job.samples} - set(self.labels)
        if strange:
            raise BadRequest(f"A sample has the label {min(strange)[:40]!r}, which is none of the labels.")
        self._right = [self.labels.index(sample.label) for sample in job.samples]
        firsts = [[texts.answer(s.input, label)[:1] for label in self.labels] for s in job.samples]
        self._firsts = [[token for (token,) in row] for row in firsts if all(row)]
        if len(self._firsts) != len(firsts):
            raise BadRequest("A label is empty.")
        self._short = all(len(set(row)) == len(row) for row in self._firsts)
        if self._short:
            self._rows = [texts.row(sample) for sample in job.samples]
        else:  # every label behind every input
            self._rows = [texts.row(sample, label) for sample in job.samples for label in self.labels]
        longest = max(len(row.ids) + 1 for row in self._rows)
        if longest > job.max_tokens:
            raise BadRequest(f"A sample has {longest} tokens; at most {job.max_tokens} are possible here.")

    def judge(self, logits: Logits) -> Evaluation:
        """Have a model answer all of them."""
        sums = np.zeros(len(self._rows))  # log-probabilities of the answers
        begins: dict[int, Any] = {}  # of the first token of each label
        order = sorted(range(len(self._rows)), key=lambda i: len(self._rows[i].ids))
        for at in range(0, len(order), _TOGETHER):
            chosen = order[at : at + _TOGETHER]
            rows = [self._rows[i] for i in chosen]
            with torch.no_grad():
                likely = torch.log_softmax(logits(rows), dim=1)
            for i, part in zip(chosen, likely.split([len(row.answer) for row in rows]), strict=True):
                answer = torch.tensor(self._rows[i].answer)
                sums[i] = float(part[torch.arange(len(answer)), answer].sum())
                if self._short:
                    begins[i] = part[0, torch.tensor(self._firsts[i])].numpy()
        count = len(self._right)
        lengths = np.array([len(row.answer) for row in self._rows])
        right = np.array(self._right)
        if self._short:
            scores = np.stack([begins[i] for i in range(count)])
            losses = -sums / lengths
        else:
            scores = sums.reshape(count, len(self.labels))
            losses = (-sums / lengths).reshape(scores.shape)[np.arange(count), right]
        return Evaluation(
            labels=self.labels,
            losses=losses.astype(np.float32),
            scores=scores.astype(np.float32),
            right=scores.argmax(axis=1) == right,
        )
