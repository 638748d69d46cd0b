"""What others see of the samples that a device keeps. Every call is blocking and short. Times are UTC milliseconds.

Implemented by `samples.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from meshnode.core.errors import BadRequest
from meshnode.policy.randomness import Randomness

MAX_SAMPLE_BYTES: Final = 1 << 16  # UTF-8 of input, output and label together
MAX_ANSWERS: Final = 256  # answers that nobody has judged yet; the oldest ones go
MAX_FORGOTTEN: Final = 1_000_000  # samples that stay out when they are imported again; the oldest ones go

Source = Literal["answer", "import"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSample:
    """A sample as it comes in. `label`: the right answer; `correct`: whether `output` was right, if anybody knows."""

    input: str
    label: str
    output: str = ""
    correct: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(NewSample):
    """A sample that is kept. `label` is empty while nobody has said what would have been right."""

    id: int
    hash: str  # 32 hexadecimal digits; tells it from others on this device, and from nothing elsewhere
    source: Source
    time_ms: int
    missed: bool | None = None  # whether the model got it wrong when it was looked at last
    loss: float | None = None
    used: int = 0  # rounds that have trained on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is kept."""

    samples: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What there is."""

    samples: int  # all of them
    labelled: int  # those that can be trained on
    wrong: int  # whose answer was wrong, or which the model gets wrong
    fresh: int  # labelled ones that no round has trained on yet
    answers: int  # that nobody has judged
    classes: int  # different labels
    size_bytes: int
    encrypted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What became of samples that came in."""

    new: int = 0
    known: int = 0  # were there already; what is new about them was taken
    forgotten: int = 0  # were forgotten once, and stay out
    evicted: int = 0  # others that had to go, because there are limits

    def __add__(self, other: Added) -> Added:
        return Added(
            new=self.new + other.new,
            known=self.known + other.known,
            forgotten=self.forgotten + other.forgotten,
            evicted=self.evicted + other.evicted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Rounds of one lineage that have trained on a sample: deltas from `first` on may hold something of it."""

    lineage: str
    first: int
    last: int
    rounds: int  # how many of them, at most: samples in one window are counted one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What was forgotten, and where it has left traces."""

    samples: int
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How the model does on one sample."""

    missed: bool
    loss: float  # of its label, natural logarithm per token


class SampleBuffer(Protocol):
    """The samples of one device."""

    # ------------------------------------------------------------ what comes in

    def keep_answer(self, input: str, output: str, wall_ms: int) -> int | None:
        """Remember an answer until somebody judges it; its id, or None when it is too long to learn from."""

    def judge(self, id: int, correct: bool, label: str, wall_ms: int) -> Sample:
        """Say whether a kept answer was right; `label`: what would have been. The last word counts.

        Raises BadRequest: no such answer, or a label that can't be one.
        """

    def add(self, samples: Iterable[NewSample], source: Source, wall_ms: int, *, again: bool = False) -> Added:
        """Take samples in one transaction; `again`: those that were forgotten once, too.

        Raises BadRequest: one of them is too long, has no input or no label. Nothing is taken then.
        """

    # ------------------------------------------------------------ what there is

    def summary(self) -> Summary: ...

    def newest(self, count: int | None = None, *, wrong: bool = False, labelled: bool = False) -> Iterator[Sample]:
        """Newest first, decrypted one by one. `wrong`, `labelled`: only those."""

    def judgements(self, count: int) -> Sequence[bool]:
        """Whether the last answers that were judged here were right, newest first."""

    # ------------------------------------------------------------ training

    def select(self, count: int, seed: int, held_out: Collection[tuple[str, str]] = ()) -> tuple[Sample, ...]:
        """Labelled samples to train on (`policy/selection.py`); the same seed and samples give the same choice.

        held_out: (input, label) of samples that must not be among them.
        """

    def draw(self, rate: float, rng: Randomness) -> tuple[Sample, ...]:
        """Each labelled sample with this probability, whatever is known of it: what the accountant's `rate` means.

        Differentially private steps are to be made on this and not on `select`, whose choice depends on the samples;
        and whoever sees what was learned must not know the draws.
        """

    def note_use(self, ids: Iterable[int], lineage: str, round: int) -> None:
        """A round trains on these: to be called before it does."""

    def note_results(self, results: Mapping[int, Result]) -> None:
        """How the model does on samples, by their id; those that are gone are left out."""

    # ------------------------------------------------------------ forgetting

    def forget(self, ids: Iterable[int], wall_ms: int) -> Forgotten:
        """Remove samples for good. Labelled ones do not come back with an import that holds them."""


def text_bytes(*texts: str) -> int:
    """Of all of them, in UTF-8. Raises BadRequest for half a surrogate pair, which no encoding has."""
    try:
        return sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise BadRequest(f"character {error.start} of a text is no character") from error


def check_sample(sample: NewSample) -> None:
    """Raises BadRequest for what is no sample to learn from: without input or label, or too long."""
    for name, text in (("input", sample.input), ("label", sample.label)):
        if not text.strip():
            raise BadRequest(f"the {name} of a sample is empty")
    size = text_bytes(sample.input, sample.label, sample.output)
    if size > MAX_SAMPLE_BYTES:
        raise BadRequest(f"a sample has {size} bytes; {MAX_SAMPLE_BYTES} are possible")
