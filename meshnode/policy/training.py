"""When to train, how many steps, and with whom: chosen by what training has brought so far, or at fixed intervals.

The gain of a round of n steps is modelled as g(n) * (w . x): x holds what is known before it (`Situation`), g grows
with the steps and flattens. w is a Bayesian linear regression over past rounds, older ones fading; a choice draws w
from what is believed (Thompson sampling: Agrawal, Goyal, arXiv:1209.3352) and takes the number of steps that promises
the most after its price, none among them. Partners have a mean gain each, drawn likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshnode.policy.randomness import Randomness

STEPS: Final = (0.25, 0.5, 1.0, 2.0)  # of `learn.steps`
MAX_PARTNERS: Final = 64  # remembered; the one met longest ago is forgotten
FADE: Final = 0.97  # what a round is worth after each later one
PRIOR: Final = 0.25  # variance of each weight before anything was seen, in gain per round squared
NOISE: Final = 0.05**2  # variance of one gain: loss of a few hundred samples moves by this much by itself
PRICE: Final = 0.01  # gain for which a round of `learn.steps` steps on mains is just worth it
_BATTERY: Final = 4.0  # times as dear on an empty battery
_FIRST: Final = 0.3  # gain that is hoped for from new samples before anything was seen
_NEW: Final = 64  # new samples beyond which more do not matter
_IDLE_S: Final = 3600.0
_SIZE: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known before a round."""

    idle_s: float  # since the device was last used for something else
    new_samples: int  # that no round has trained on
    last_gain: float  # loss before minus loss after, of the round before; 0: there was none
    battery: float = 1.0  # from 0 to 1; 1 on mains

    def features(self) -> tuple[float, ...]:
        """Each about from 0 to 1."""
        return (
            1.0,
            math.log1p(min(max(self.new_samples, 0), _NEW)) / math.log1p(_NEW),
            math.tanh(4 * self.last_gain),
            min(max(self.idle_s, 0.0) / _IDLE_S, 1.0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to do now. `steps` 0: wait. `why`: a sentence for people."""

    steps: int
    partner: str | None
    why: str


class Scheduler:
    """Learns from round to round. Its state is small, plain data (`as_json`)."""

    def __init__(self, steps: int, rng: Randomness, state: Mapping[str, Any] | None = None) -> None:
        """
        Args:
          steps: of an ordinary round (`learn.steps`).
          state: what `as_json` gave; one that can't be read is as none.
        """
        self._choices = tuple(sorted({max(1, round(steps * share)) for share in STEPS}))
        self._steps = steps
        self._rng = rng
        self._precision = [[1 / PRIOR if i == j else 0.0 for j in range(_SIZE)] for i in range(_SIZE)]
        self._moment = [0.0, _FIRST / PRIOR, 0.0, 0.0]
        self._rounds = 0
        self._partners: dict[str, tuple[float, float]] = {}  # faded rounds, faded sum of gains; met last at the end
        if state is not None:
            self._restore(state)

    # ------------------------------------------------------------ choosing

    def choose(self, situation: Situation, partners: Sequence[str] = ()) -> Choice:
        """What to do now; `partners`: those that a round could be made with, in the order of the schedule."""
        features = situation.features()
        mean = _solve(_cholesky(self._precision), self._moment)
        drawn = self._drawn(mean)
        believed = _dot(mean, features)
        steps = max((0, *self._choices), key=lambda steps: self._worth(steps, _dot(drawn, features), situation))
        partner = self._partner(partners) if steps else None
        return Choice(steps=steps, partner=partner, why=self._words(situation, believed, steps, partner))

    def _worth(self, steps: int, gain: float, situation: Situation) -> float:
        return self._flattened(steps) * gain - self._price(steps, situation)

    def _flattened(self, steps: int) -> float:
        """Share of the gain of an ordinary round that so many steps bring."""
        return math.log1p(steps / self._steps) / math.log(2)

    def _price(self, steps: int, situation: Situation) -> float:
        return PRICE * steps / self._steps * (1 + (_BATTERY - 1) * (1 - min(max(situation.battery, 0.0), 1.0)))

    def _drawn(self, mean: Sequence[float]) -> list[float]:
        """Weights as they may be: a draw from the normal distribution that is believed in."""
        lower = _cholesky(self._precision)
        normal = [self._rng.gauss(0, 1) for _ in range(_SIZE)]
        return [m + d for m, d in zip(mean, _back(lower, normal), strict=True)]

    def _partner(self, partners: Sequence[str]) -> str | None:
        """Whoever is unknown is hoped to bring as much as the best one, so that everybody is tried."""

        def hope(partner: str) -> float:
            rounds, gains = self._partners.get(partner, (0.0, 0.0))
            precision = 1 / PRIOR + rounds / NOISE
            return gains / NOISE / precision + self._rng.gauss(0, 1) / math.sqrt(precision)

        return max(partners, key=hope) if partners else None

    def _words(self, situation: Situation, believed: float, steps: int, partner: str | None) -> str:
        seen = f"after {self._rounds} rounds" if self._rounds else "before the first round"
        known = f"{situation.new_samples} new samples, idle for {situation.idle_s / 60:.0f} min"
        if situation.battery < 1:
            known += f", battery at {100 * situation.battery:.0f} %"
        promise = f"{seen}, a round of {self._steps} steps is believed to lower the loss by {max(believed, 0.0):.3f}"
        if not steps:
            return f"waits: {known}; {promise}"
        whom = f" with {partner}" if partner else ""
        return f"trains {steps} steps{whom}: {known}; {promise}"

    # ------------------------------------------------------------ learning

    def learn(self, situation: Situation, choice: Choice, gain: float) -> None:
        """What a round has brought: loss before minus loss after, 0 for one that was broken off.

        Waiting teaches nothing. Raises ValueError: a gain that is no number.
        """
        if not math.isfinite(gain):
            raise ValueError(f"a gain is a number, and {gain} is none")
        if not choice.steps:
            return
        gain = min(max(gain, -1.0), 1.0)  # one round that went very wrong is not to drown all others
        share = self._flattened(choice.steps)
        scaled = [share * value for value in situation.features()]
        self._fade()
        for i in range(_SIZE):
            self._moment[i] += scaled[i] * gain / NOISE
            for j in range(_SIZE):
                self._precision[i][j] += scaled[i] * scaled[j] / NOISE
        self._rounds += 1
        if choice.partner is not None:
            rounds, gains = self._partners.pop(choice.partner, (0.0, 0.0))
            self._partners[choice.partner] = (rounds * FADE + 1, gains * FADE + gain)
            while len(self._partners) > MAX_PARTNERS:
                del self._partners[next(iter(self._partners))]

    def _fade(self) -> None:
        """What was seen counts less, and what was believed before anything was seen comes back."""
        for i in range(_SIZE):
            self._moment[i] = FADE * self._moment[i] + (1 - FADE) * (_FIRST / PRIOR if i == 1 else 0.0)
            for j in range(_SIZE):
                prior = 1 / PRIOR if i == j else 0.0
                self._precision[i][j] = FADE * self._precision[i][j] + (1 - FADE) * prior

    # ------------------------------------------------------------ its state

    def as_json(self) -> dict[str, Any]:
        """What has been learned, as plain data."""
        return {
            "precision": self._precision,
            "moment": self._moment,
            "rounds": self._rounds,
            "partners": [[name, *seen] for name, seen in self._partners.items()],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            precision = [[float(value) for value in row] for row in state["precision"]]
            moment = [float(value) for value in state["moment"]]
            partners = {str(name): (float(rounds), float(gains)) for name, rounds, gains in state["partners"]}
            rounds = int(state["rounds"])
            if [len(row) for row in precision] != [_SIZE] * _SIZE or len(moment) != _SIZE:
                return
            if not all(map(math.isfinite, (*moment, *(value for pair in partners.values() for value in pair)))):
                return
            _cholesky(precision)
        except (KeyError, TypeError, ValueError, OverflowError):
            return
        self._precision, self._moment, self._rounds = precision, moment, rounds
        self._partners = dict(list(partners.items())[-MAX_PARTNERS:])


def fixed(since_s: float, interval_s: float, steps: int, partners: Sequence[str] = ()) -> Choice:
    """Without a scheduler: `steps` once in an interval, with the first partner. `since_s`: after the last round."""
    if since_s < interval_s:
        left = math.ceil((interval_s - since_s) / 60)
        return Choice(steps=0, partner=None, why=f"waits: the next round is due in {left} min (learn.interval)")
    partner = partners[0] if partners else None
    whom = f" with {partner}" if partner else ""
    return Choice(steps=steps, partner=partner, why=f"trains {steps} steps{whom}, as every {interval_s / 60:.0f} min")


# ---------------------------------------------------------------- small symmetric matrices


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _cholesky(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """The lower triangle L with L L' = matrix. Raises ValueError when the matrix is not positive definite."""
    size = len(matrix)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            if i != j:
                lower[i][j] = rest / lower[j][j]
            elif rest > 0 and math.isfinite(rest):
                lower[i][i] = math.sqrt(rest)
            else:
                raise ValueError("the matrix is not positive definite")
    return lower


def _back(lower: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """x with L' x = values."""
    size = len(values)
    out = [0.0] * size
    for i in reversed(range(size)):
        out[i] = (values[i] - sum(lower[k][i] * out[k] for k in range(i + 1, size))) / lower[i][i]
    return out


def _solve(lower: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """x with L L' x = values."""
    forward: list[float] = []
    for i, value in enumerate(values):
        forward.append((value - sum(lower[i][k] * forward[k] for k in range(i))) / lower[i][i])
    return _back(lower, forward)
