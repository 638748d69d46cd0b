"""What differentially private training costs: Renyi accounting of the sampled Gaussian mechanism.

One step draws each sample with the probability `rate`, clips what each sample says to the norm C and adds Gaussian
noise of deviation `noise` * C. Its Renyi divergences, one per order, add up over steps, and give an epsilon for any
delta at the end.

Sources: Mironov, Talwar, Zhang, "Renyi differential privacy of the sampled Gaussian mechanism" (arXiv:1908.10530),
section 3.3; Canonne, Kamath, Steinke (arXiv:2004.00010), proposition 12, for the way from orders to epsilon.
Neighbouring data sets differ by one sample that is there or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

# Fine where large epsilons have their best order, coarse where small ones have it.
ORDERS: Final = (*(1 + x / 10 for x in range(1, 100)), *map(float, range(11, 64)), 128.0, 256.0, 512.0, 1024.0)
MAX_NOISE: Final = 1000.0  # beyond it nothing is learned
_POINTS: Final = 8  # of an integral, per deviation
_TAIL: Final = 12  # deviations beyond which it holds nothing: exp(-72)


@lru_cache(maxsize=256)
def step_cost(rate: float, noise: float) -> tuple[float, ...]:
    """The Renyi divergence of one step at each of ORDERS.

    Raises ValueError: rate outside [0, 1], noise that is no positive number.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a sampling rate is from 0 to 1, and {rate} is not")
    if not (noise > 0 and math.isfinite(noise)):
        raise ValueError(f"a noise multiplier is a positive number, and {noise} is not")
    return tuple(_divergences(rate, noise))


def epsilon(costs: Sequence[float], delta: float) -> float:
    """The least epsilon with which `costs` (divergences at ORDERS, added over steps) are (epsilon, delta)-private.

    Raises ValueError: another number of costs, delta outside (0, 1).
    """
    if len(costs) != len(ORDERS):
        raise ValueError(f"{len(costs)} divergences were given for {len(ORDERS)} orders")
    if not 0 < delta < 1:
        raise ValueError(f"delta is between 0 and 1, and {delta} is not")
    return min(_epsilon_at(order, cost, delta) for order, cost in zip(ORDERS, costs, strict=True))


def spent(rate: float, noise: float, steps: int, delta: float) -> float:
    """Epsilon of so many equal steps."""
    return epsilon([steps * cost for cost in step_cost(rate, noise)], delta)


@lru_cache(maxsize=16)
def noise_for(limit: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier with which so many steps stay within epsilon `limit`, to a thousandth above it.

    Takes a second on a small device. Raises ValueError when MAX_NOISE is not enough.
    """
    low, high = 0.1, 1.0
    while spent(rate, high, steps, delta) > limit:
        low, high = high, high * 2
        if high > MAX_NOISE:
            raise ValueError(
                f"no noise makes {steps} steps at the sampling rate {rate:g} fit into epsilon {limit:g} at delta "
                f"{delta:g}: take fewer steps, a smaller rate, or a greater epsilon"
            )
    while high - low > low / 2000:
        middle = (low + high) / 2
        if spent(rate, middle, steps, delta) > limit:
            low = middle
        else:
            high = middle
    return high


def _epsilon_at(order: float, cost: float, delta: float) -> float:
    if not math.isfinite(cost):
        return math.inf
    if delta**2 + math.expm1(-cost) > 0:
        return 0.0  # the divergence is so small that it bounds the total variation by delta (Bretagnolle, Huber)
    return max(0.0, cost + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def _divergences(rate: float, noise: float) -> Iterator[float]:
    """At each of ORDERS."""
    if rate in (0, 1):
        yield from (rate * order / (2 * noise**2) for order in ORDERS)
        return
    between = _moments(rate, noise, [order for order in ORDERS if not order.is_integer()])
    for order in ORDERS:
        log_a = _whole_moment(rate, noise, int(order)) if order.is_integer() else next(between)
        yield max(0.0, log_a) / (order - 1)


def _whole_moment(rate: float, noise: float, order: int) -> float:
    """Logarithm of the moment of a whole order: a sum over binomial terms."""
    logs = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + k * math.log(rate)
        + (order - k) * math.log1p(-rate)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    return _log_sum(logs)


def _moments(rate: float, noise: float, orders: Sequence[float]) -> Iterator[float]:
    """The same for any orders: E (1 - q + q exp((2z - 1) / 2s^2))^order over z, normal of deviation s.

    By the trapezoidal rule, whose error falls exponentially with the points per deviation where what is summed is
    smooth and ends in Gaussian tails, as here.
    """
    step = noise / _POINTS
    first, last = math.floor(-_TAIL * _POINTS), math.ceil((max(orders) + _TAIL * noise) / step)
    weights: list[float] = []  # logarithms
    ratios: list[float] = []  # logarithms of what is raised to the order
    for at in range(first, last + 1):
        z = at * step
        weights.append(-(z * z) / (2 * noise**2) - math.log(_POINTS * math.sqrt(2 * math.pi)))
        ratios.append(_log_mixed(rate, (2 * z - 1) / (2 * noise**2)))
    for order in orders:
        logs = [weight + order * ratio for weight, ratio in zip(weights, ratios, strict=True)]
        if max(logs) > 1:
            yield _log_sum(logs)
        else:  # near 1: what the moment has more than that is summed, or its digits would be lost
            more = math.fsum(
                math.exp(weight) * math.expm1(order * ratio)
                if order * ratio < 1
                else math.exp(log) - math.exp(weight)
                for weight, ratio, log in zip(weights, ratios, logs, strict=True)
            )
            yield math.log1p(more)


def _log_mixed(rate: float, t: float) -> float:
    """log(1 - rate + rate * exp(t))."""
    if t < 1:
        return math.log1p(rate * math.expm1(t))
    return t + math.log(rate) + math.log1p((1 - rate) / rate * math.exp(-t))


def _log_sum(logs: Sequence[float]) -> float:
    """Logarithm of a sum of exponentials."""
    most = max(logs)
    return most + math.log(math.fsum(math.exp(value - most) for value in logs))
