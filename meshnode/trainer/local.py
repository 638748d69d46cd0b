"""Methods whose results are one node's own: AdaLoRA, prefix tuning and prompt tuning, as peft has them.

AdaLoRA (arXiv 2303.10512) moves ranks to where they help, so no two nodes have the same tensors. Prefix tuning (arXiv
2101.00190) and prompt tuning (arXiv 2104.08691) learn keys and values, or embeddings, of virtual tokens before the
text: no file of a stage changes, and no stage can take them either. Runs in the trainer only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import peft
import torch

from meshnode.core.errors import BadRequest, DiskError, ModelError
from meshnode.publisher.words import first_line
from meshnode.trainer.adapted import answers_only, padded
from meshnode.trainer.checkpoint import replace_file
from meshnode.trainer.port import LocalJob, Step
from meshnode.trainer.texts import Row
from meshnode.trainer.training import Outcome, batch_of

ADAPTER: Final = "adapter"  # the folder with what a job has learned, in the job's
_STATE: Final = "state.pt"
_ALLOCATOR: Final = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what AdaLoRA knows about the importance of ranks
_SPARE: Final = 1.5  # ranks that AdaLoRA begins with, as a multiple of those that it keeps


class LocalModel:
    """A base model with an adapter of one of the METHODS."""

    def __init__(self, model: Any) -> None:
        self.peft = model.eval()

    @staticmethod
    def fresh(base: Any, job: LocalJob) -> LocalModel:
        """Raises BadRequest for an unknown method, ModelError for a model that can't have it."""
        torch.manual_seed(job.seed)
        try:
            return LocalModel(peft.get_peft_model(base, _config(job)))
        except (ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ModelError(
                f"The method {job.method} can't be used with this model: {first_line(error)}."
            ) from error

    @staticmethod
    def saved(base: Any, folder: Path) -> LocalModel:
        """Raises BadRequest when the folder holds no adapter that fits."""
        try:
            return LocalModel(peft.PeftModel.from_pretrained(base, str(folder)))
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise BadRequest(f"{folder} holds no adapter for this model: {first_line(error)}.") from error

    @property
    def adapts_layers(self) -> bool:
        """Whether modules of the base model were replaced."""
        return not self.peft.active_peft_config.is_prompt_learning

    def detach(self) -> Any:
        """The base model, as it was."""
        return self.peft.unload() if self.adapts_layers else self.peft.get_base_model()

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """As `AdaptedModel.logits`."""
        ids = padded(rows)
        mask = torch.stack([torch.arange(ids.shape[1]) < len(row.ids) for row in rows]).long()
        with answers_only(self.peft.get_base_model(), rows):
            return self.peft(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()

    def save(self, folder: Path) -> None:
        """Raises DiskError."""
        self.peft.active_peft_config.base_model_name_or_path = ""
        try:
            self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        except OSError as error:
            raise DiskError(f"{folder} can't be written: {error.strerror or error}.") from error


def train_locally(
    model: LocalModel, job: LocalJob, identity: str, rows: Sequence[Row], report: Callable[[Step], None]
) -> Outcome:
    """Do the steps of a job that are not done yet, and save the adapter. Raises DiskError."""
    factors = [p for p in model.peft.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(factors, lr=job.schedule.rate, weight_decay=0.0)
    path = job.folder / _STATE
    losses, seconds = _restored(path, identity, model, factors, optimiser)
    resumed = len(losses)
    while len(losses) < job.steps:
        begin, number = time.perf_counter(), len(losses)
        chosen = [rows[i] for i in batch_of(len(rows), job.batch, job.seed, job.schedule.done + number)]
        targets = torch.tensor([token for row in chosen for token in row.answer])
        loss = torch.nn.functional.cross_entropy(model.logits(chosen), targets)
        (loss + _far_from_orthogonal(model)).backward()
        for group in optimiser.param_groups:
            group["lr"] = job.schedule.at(number)
        optimiser.step()
        if job.method == "adalora":
            model.peft.base_model.update_and_allocate(number)
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        seconds += time.perf_counter() - begin
        _save(path, identity, model, factors, optimiser, losses, seconds)
        report(Step(number + 1, losses[-1], time.perf_counter() - begin))
    model.save(job.folder / ADAPTER)
    return Outcome(losses, seconds, resumed)


def _config(job: LocalJob) -> Any:
    task = {"task_type": "CAUSAL_LM"}
    if job.method == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=job.rank, **task)
    if job.method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=job.rank, **task)
    if job.method == "adalora":
        return peft.AdaLoraConfig(
            init_r=max(job.rank + 1, round(job.rank * _SPARE)),
            target_r=job.rank,
            lora_alpha=2 * job.rank,
            target_modules=list(job.targets),
            tinit=job.steps // 8,
            tfinal=job.steps // 4,
            deltaT=1,
            total_step=job.steps,
            **task,
        )
    raise BadRequest(f"There is no method {job.method!r}; there are adalora, prefix and prompt.")


def _far_from_orthogonal(model: LocalModel) -> torch.Tensor | float:
    """AdaLoRA's second loss (equation 4): how far its factors are from orthogonal ones. 0 for other methods."""
    config = model.peft.active_peft_config
    if not isinstance(config, peft.AdaLoraConfig):
        return 0.0
    found = []
    for name, p in model.peft.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name) and p.numel():
            square = p @ p.T if "lora_A" in name else p.T @ p
            found.append(torch.linalg.matrix_norm(square - torch.eye(len(square))))
    return config.orth_reg_weight * torch.stack(found).mean()


def _save(
    path: Path,
    identity: str,
    model: LocalModel,
    factors: list[torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    losses: list[float],
    seconds: float,
) -> None:
    state: dict[str, Any] = {
        "job": identity,
        "factors": [p.detach() for p in factors],
        "optimiser": optimiser.state_dict(),
        "losses": losses,
        "seconds": seconds,
    }
    allocator = getattr(model.peft.base_model, "rankallocator", None)
    if allocator is not None:
        state["allocator"] = {name: getattr(allocator, name) for name in _ALLOCATOR}
        state["ranks"] = model.peft.active_peft_config.rank_pattern
    data = BytesIO()
    torch.save(state, data)
    replace_file(path, data.getvalue())


def _restored(
    path: Path,
    identity: str,
    model: LocalModel,
    factors: list[torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> tuple[list[float], float]:
    """Losses and seconds of the steps that are done."""
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        return [], 0.0
    if state.get("job") != identity:
        return [], 0.0
    with torch.no_grad():
        for p, value in zip(factors, state["factors"], strict=True):
            p.copy_(value)
    optimiser.load_state_dict(state["optimiser"])
    if "allocator" in state:
        allocator = model.peft.base_model.rankallocator
        for name in _ALLOCATOR:
            setattr(allocator, name, state["allocator"][name])
        model.peft.active_peft_config.rank_pattern = state["ranks"]
        allocator.peft_config.rank_pattern = state["ranks"]
    return list(state["losses"]), float(state["seconds"])
