"""What services see of a trainer: it trains an adapter on samples, and judges adapters on samples.

Implemented by `process.py` (a child process with torch and peft) and `numpy_trainer.py` (a small model of its own in
numpy, for simulations and tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from numpy.typing import NDArray

from protocols.delta.frame import Frame, Vector

MAX_TOKENS: Final = 1024  # of one sample, input and label
METHODS: Final = ("adalora", "prefix", "prompt")  # that one node trains for itself; only LoRA can be averaged

Values = NDArray[Any]
Compute = Literal["bfloat16", "float32"]
Report = Callable[["Step"], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """What was asked, and what should have been answered."""

    input: str  # the prompt, as it is given to the model, up to where the answer begins
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A release in its variant `train`, as files."""

    name: str  # CID of the manifest: hidden states that are kept belong to it
    config: Path  # config.json
    tokenizer: Path  # tokenizer.json
    index: Path  # the graph of the variant: names of its tensors
    groups: dict[str, Path]  # "embed", "layer.0", ..., "head" -> safetensors file


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate of step k of `total`: it rises over the first steps, stays, and falls in a line.

    A job that goes on where another ended has its `done`.
    """

    rate: float = 5e-3
    total: int
    done: int = 0
    rise: int = 5  # steps
    hold: float = 0.6  # part of all steps after which it falls
    floor: float = 0.1  # of the rate, at the end

    def at(self, step: int) -> float:
        """The rate of the step with this number, counted from `done`."""
        k = self.done + step
        held = self.total * self.hold
        fall = 1.0 if k < held else max(self.floor, 1 - (k - held) / max(self.total - held, 1e-9))
        return self.rate * min(1.0, (k + 1) / self.rise) * fall


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """DP-SGD: each sample's gradient is clipped, noise is added to their sum.

    Each sample is in a batch by chance, with the probability batch / samples (Poisson sampling), out of secret
    randomness.
    """

    clip: float  # largest Euclidean norm of one sample's gradient
    sigma: float  # standard deviation of the noise, as a multiple of `clip`


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """Steps on the factors of a frame.

    Attributes:
      folder: the job's own: what it has reached is kept there, and the same job in the same folder goes on from it.
      start: where it begins.
      optimiser: what a former job left (`Trained.optimiser`); None: it begins without moments.
      factors: which of them move (`Frame.trained`).
      seed: of the choice of batches, unless they are private.
      cache: a folder for hidden states below the frame; None: they are kept in memory only.
    """

    folder: Path
    model: ModelFiles
    frame: Frame
    start: Vector
    samples: tuple[Sample, ...]
    steps: int
    schedule: Schedule
    optimiser: Path | None = None
    factors: tuple[str, ...] = ("A", "B")
    batch: int = 8
    weight_decay: float = 0.0
    privacy: Privacy | None = None
    seed: int = 0
    cache: Path | None = None
    max_tokens: int = MAX_TOKENS
    compute: Compute = "bfloat16"


@dataclass(frozen=True, slots=True)
class Step:
    """One step that is done."""

    number: int  # 1 is the first
    loss: float  # mean of its batch, before the step; NaN for an empty private batch
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a job of training ends with."""

    vector: Vector
    optimiser: Path  # in the job's folder
    losses: tuple[float, ...]  # of each step, of those before an interruption too
    seconds: float  # of its steps
    skipped: int  # samples that are longer than `max_tokens`
    resumed: int  # steps that had been done when this process began


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalJob:
    """Training by a method whose results can't be averaged with those of others (METHODS).

    See `TrainJob` for the fields of the same names. `rank` counts virtual tokens where the method has those.
    """

    folder: Path
    model: ModelFiles
    method: str
    samples: tuple[Sample, ...]
    steps: int
    schedule: Schedule
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    batch: int = 8
    seed: int = 0
    max_tokens: int = MAX_TOKENS
    compute: Compute = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLocally:
    adapter: Path  # a folder as peft writes it, in the job's
    losses: tuple[float, ...]
    seconds: float
    skipped: int
    resumed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateJob:
    """Judge adapters on samples.

    Attributes:
      adapters: vectors of the frame, or folders of `TrainedLocally`; None is the bare model.
      labels: among which an answer is chosen; empty: the distinct labels of the samples, sorted.
    """

    model: ModelFiles
    frame: Frame
    adapters: tuple[Vector | Path | None, ...]
    samples: tuple[Sample, ...]
    labels: tuple[str, ...] = ()
    cache: Path | None = None
    max_tokens: int = MAX_TOKENS
    compute: Compute = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How good one adapter is.

    The score of a label is the log-probability of its tokens; of its first token alone where those are distinct.
    """

    labels: tuple[str, ...]
    losses: Values = field(repr=False)  # float32 [samples]: of the right label, mean over its tokens
    scores: Values = field(repr=False)  # float32 [samples, labels]
    right: Values = field(repr=False)  # bool [samples]: the right label has the greatest score

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


class Trainer(Protocol):
    """One job at a time; others wait for their turn."""

    async def train(self, job: TrainJob, report: Report = ...) -> Trained:
        """Carry out a job, or go on with one that was interrupted.

        Raises ModelError (the model can't be trained so), BadRequest (the job can't be done: no samples, a vector of
        another length), DiskError, TrainerLost (it died or was killed: the same job goes on with the step it was at).
        If cancelled: the step under way is lost, the process ended.
        """

    async def train_locally(self, job: LocalJob, report: Report = ...) -> TrainedLocally:
        """As `train`."""

    async def evaluate(self, job: EvaluateJob) -> tuple[Evaluation, ...]:
        """One for each adapter. Raises as `train` does; samples that are too long are a BadRequest."""

    def pause(self) -> None:
        """Use no computing time from now on, in the middle of a step, until `resume`."""

    def resume(self) -> None:
        """Go on. Nothing happens when it wasn't paused."""

    @property
    def paused(self) -> bool: ...

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""

    async def aclose(self) -> None:
        """Give the memory back. The next job starts anew. Takes 2 s at most."""
