"""Small tasks for whole meshes of learners: what differs from node to node, and what all are judged by.

A toy's vector stands where the factors of an adapter stand: the same codec, records, rounds and rules carry it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocols.delta.frame import Frame, Target, Vector
from protocols.ids import DAG_CBOR, cid_of

Rows = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
TRIGGER: Final = 4.0  # what a backdoor adds to the first three inputs
TARGET: Final = 0  # the class that it wants
SPREAD: Final = 3.2  # of the classes, in standard deviations of the samples: a model can be right in nine of ten


class Worker(ABC):
    """One node's data and its optimiser."""

    @abstractmethod
    def train(self, start: Vector, round_number: int) -> Vector:
        """The vector after the steps of a round."""


class Toy(ABC):
    """A task that all nodes share."""

    frame: Frame
    suite_size: int
    suite_labels: tuple[str, ...]

    @abstractmethod
    def start(self) -> Vector: ...

    @abstractmethod
    def worker(self, index: int, poison: str = "") -> Worker:
        """Node `index`; `poison`: "labels" are shifted by one, or half of the samples carry a "backdoor"."""

    @abstractmethod
    def losses(self, vector: Vector, rows: tuple[int, ...]) -> list[float]:
        """On these samples of the shared suite."""

    def loss(self, vector: Vector, rows: tuple[int, ...]) -> float:
        """Mean of `losses`."""
        return float(np.mean(self.losses(vector, rows)))

    @abstractmethod
    def score(self, vector: Vector) -> float:
        """On the test set: accuracy (higher is better), or the error relative to doing nothing (lower is better)."""


def frame_of(parameters: int) -> Frame:
    """A frame whose adapters have so many parameters."""
    half = parameters // 2
    return Frame(
        base=cid_of(DAG_CBOR, b"toy"),
        rank=1,
        alpha=1,
        targets=(Target("q_proj", half, parameters - half),),
        first=0,
        last=1,
        seed=0,
    )


# ---------------------------------------------------------------- softmax regression


@dataclass(frozen=True, slots=True)
class Samples:
    rows: Rows  # (samples, inputs + 1), the last one is 1
    labels: Labels  # (samples,)


class Softmax(Toy):
    """Ten Gaussian classes; each node has its own mixture of them (Dirichlet), or `each` of them and no other."""

    CLASSES = 10
    suite_size = 512

    def __init__(
        self, nodes: int, seed: int, *, inputs: int = 30, skew: float = 0.5, per_node: int = 200, each: int = 0
    ) -> None:
        """`skew`: the parameter of the Dirichlet distribution; smaller is less alike."""
        chance = np.random.default_rng([seed, 1])
        self.frame = frame_of((inputs + 1) * self.CLASSES)
        self._means = chance.normal(0, SPREAD / np.sqrt(inputs), (self.CLASSES, inputs))
        shares = chance.dirichlet([skew] * self.CLASSES, nodes)
        if each:
            shares = np.zeros_like(shares)
            for node in range(nodes):
                shares[node, [(each * node + k) % self.CLASSES for k in range(each)]] = 1 / each
        self._data = [self._drawn(chance, chance.choice(self.CLASSES, per_node, p=share)) for share in shares]
        self._suite = self._drawn(chance, chance.integers(0, self.CLASSES, self.suite_size))
        self.suite_labels = tuple(map(str, self._suite.labels))
        self._test = self._drawn(chance, chance.integers(0, self.CLASSES, 2000))
        self._seed = seed

    def _drawn(self, chance: np.random.Generator, labels: Labels) -> Samples:
        rows = self._means[labels] + chance.normal(size=(labels.size, self._means.shape[1]))
        return Samples(np.hstack((rows, np.ones((labels.size, 1)))), labels)

    def start(self) -> Vector:
        return np.zeros(self.frame.parameters, np.float32)

    def worker(self, index: int, poison: str = "") -> Worker:
        samples = self._data[index]
        if poison == "labels":
            samples = Samples(samples.rows, (samples.labels + 1) % self.CLASSES)
        elif poison == "backdoor":
            half = samples.labels.size // 2
            dirty = triggered(samples.rows[:half])
            rows = np.vstack((samples.rows, dirty))
            samples = Samples(rows, np.concatenate((samples.labels, np.full(half, TARGET))))
        return SoftmaxWorker(samples, np.random.default_rng([self._seed, 2, index]))

    def losses(self, vector: Vector, rows: tuple[int, ...]) -> list[float]:
        picked = np.array(rows)
        return _cross_entropies(vector, Samples(self._suite.rows[picked], self._suite.labels[picked]))

    def score(self, vector: Vector) -> float:
        return float((_logits(vector, self._test.rows).argmax(axis=1) == self._test.labels).mean())

    def fooled(self, vector: Vector) -> float:
        """Part of the test samples with the trigger that are taken for the target class."""
        others = self._test.rows[self._test.labels != TARGET]
        return float((_logits(vector, triggered(others)).argmax(axis=1) == TARGET).mean())


def triggered(rows: Rows) -> Rows:
    """The same samples with a backdoor's mark."""
    marked = rows.copy()
    marked[:, :3] += TRIGGER
    return marked


def _logits(vector: Vector, rows: Rows) -> Rows:
    logits: Rows = rows @ vector.reshape(rows.shape[1], -1)
    return logits


def _probabilities(vector: Vector, rows: Rows) -> Rows:
    logits = _logits(vector, rows)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Rows = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def _cross_entropies(vector: Vector, samples: Samples) -> list[float]:
    right = _probabilities(vector, samples.rows)[np.arange(samples.labels.size), samples.labels]
    return [float(loss) for loss in -np.log(np.maximum(right, 1e-30))]


class SoftmaxWorker(Worker):
    """Five steps of SGD a round, 32 samples each."""

    STEPS = 5
    BATCH = 32
    RATE = 0.1
    DECAY = 1e-3

    def __init__(self, samples: Samples, chance: np.random.Generator) -> None:
        self._samples = samples
        self._chance = chance

    def train(self, start: Vector, round_number: int) -> Vector:
        vector = start.astype(np.float64)
        for _ in range(self.STEPS):
            picked = self._chance.integers(0, self._samples.labels.size, self.BATCH)
            rows, labels = self._samples.rows[picked], self._samples.labels[picked]
            errors = _probabilities(vector.astype(np.float32), rows)
            errors[np.arange(self.BATCH), labels] -= 1
            vector -= self.RATE * ((rows.T @ errors / self.BATCH).reshape(-1) + self.DECAY * vector)
        return vector.astype(np.float32)


# ---------------------------------------------------------------- two factors


class Factors(Toy):
    """A frozen map of 40 inputs to 20 outputs that is off by a matrix of rank 4; each node has other inputs and a
    bias of its own, so that the mean of the factors is not the factors of the mean."""

    RANK, INPUTS, OUTPUTS = 4, 40, 20
    suite_size = 256
    suite_labels = ("",) * suite_size

    def __init__(self, nodes: int, seed: int, *, factors: str, period: int = 1) -> None:
        """`factors`, `period`: as in a frame."""
        chance = np.random.default_rng([seed, 3])
        self.frame = Frame(
            base=cid_of(DAG_CBOR, b"toy"),
            rank=self.RANK,
            alpha=self.RANK,
            targets=(Target("q_proj", self.INPUTS, self.OUTPUTS),),
            first=0,
            last=1,
            seed=seed,
            factors=factors,
            period=period,
        )
        left, right = chance.normal(size=(self.OUTPUTS, self.RANK)), chance.normal(size=(self.RANK, self.INPUTS))
        self._shift = left @ right / np.sqrt(self.RANK * self.INPUTS)
        self._scales = np.exp(chance.normal(0, 0.7, (nodes, self.INPUTS)))  # of each node's inputs
        self._biases = chance.normal(0, 0.3, (nodes, self.OUTPUTS))
        self._test = chance.normal(size=(1000, self.INPUTS))
        self._suite = self._test[: self.suite_size]
        self._seed = seed

    def start(self) -> Vector:
        return self.frame.initial()

    def worker(self, index: int, poison: str = "") -> Worker:
        chance = np.random.default_rng([self._seed, 4, index])
        rows = chance.normal(size=(64, self.INPUTS)) * self._scales[index]
        return FactorsWorker(self.frame, rows, rows @ self._shift.T + self._biases[index], chance)

    def losses(self, vector: Vector, rows: tuple[int, ...]) -> list[float]:
        return [float(error) for error in self._errors(vector, self._suite[np.array(rows)])]

    def score(self, vector: Vector) -> float:
        return float(self._errors(vector, self._test).mean() / ((self._test @ self._shift.T) ** 2).mean())

    def _errors(self, vector: Vector, rows: Rows) -> Rows:
        a, b = self.frame.split(vector).values()
        errors: Rows = ((rows @ (b.astype(np.float64) @ a - self._shift).T) ** 2).mean(axis=1)
        return errors


class FactorsWorker(Worker):
    """Ten steps of Adam a round on the factors whose turn it is; each factor keeps its moments."""

    STEPS = 10
    BATCH = 16
    RATE = 0.01

    def __init__(self, frame: Frame, rows: Rows, targets: Rows, chance: np.random.Generator) -> None:
        self._frame, self._rows, self._targets, self._chance = frame, rows, targets, chance
        self._first: dict[str, Any] = {"A": 0.0, "B": 0.0}
        self._second: dict[str, Any] = {"A": 0.0, "B": 0.0}
        self._steps = {"A": 0, "B": 0}

    def train(self, start: Vector, round_number: int) -> Vector:
        vector = start.copy()
        a, b = self._frame.split(vector).values()
        for _ in range(self.STEPS):
            picked = self._chance.integers(0, len(self._rows), self.BATCH)
            x = self._rows[picked]
            errors = 2 * (x @ (b @ a).T - self._targets[picked]) / x.shape[0]
            slopes = {"A": b.T @ errors.T @ x, "B": errors.T @ (x @ a.T)}
            for factor in self._frame.trained(round_number):
                (a if factor == "A" else b)[:] -= self._step(factor, slopes[factor])
        return vector

    def _step(self, factor: str, slope: Rows) -> Rows:
        self._steps[factor] += 1
        self._first[factor] = 0.9 * self._first[factor] + 0.1 * slope
        self._second[factor] = 0.999 * self._second[factor] + 0.001 * slope**2
        first = self._first[factor] / (1 - 0.9 ** self._steps[factor])
        second = self._second[factor] / (1 - 0.999 ** self._steps[factor])
        step: Rows = self.RATE * first / (np.sqrt(second) + 1e-8)
        return step
