"""Secrets in shares, of which any `threshold` give the secret and fewer say nothing (Shamir, CACM 1979)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

PRIME: Final = (1 << 521) - 1  # a Mersenne prime: secrets of 32 bytes are elements of its field
SHARE_BYTES: Final = 66


def split(secret: int, coefficients: Sequence[int], count: int) -> tuple[int, ...]:
    """The shares of members 0 to count - 1: the polynomial with these coefficients, after the secret, at 1 to count.

    Args:
      coefficients: random elements of the field, one fewer than the shares that will be needed.
    """
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in (*reversed(coefficients), secret):
            value = (value * x + coefficient) % PRIME
        shares.append(value)
    return tuple(shares)


def combine(shares: Mapping[int, int]) -> int:
    """The secret that these shares give, by member: Lagrange's interpolation at 0. With too few of them, or with
    wrong ones, it is any element of the field."""
    secret = 0
    for member, share in shares.items():
        above = below = 1
        for other in shares:
            if other != member:
                above = above * (other + 1) % PRIME
                below = below * (other - member) % PRIME
        secret += share * above * pow(below, -1, PRIME)
    return secret % PRIME
