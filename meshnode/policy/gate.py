"""Whether another's adapter is good enough to be mixed in: its loss on a suite that all share.

A node's own samples would not do: where data differ from node to node, every honest adapter looks bad to all others,
and each ends up alone. The samples are drawn after the adapter was committed to, so it can't be made for them.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

DRAWN: Final = 128  # samples of the suite for one adapter
FACTOR: Final = 1.10  # of our own loss
MIX_FACTOR: Final = 1.25  # of a mix of both: two that know different things can lose a little by meeting
SLACK: Final = 0.02  # and this much more, for losses near zero


def passes(theirs: float, own: float, before: float) -> bool:
    """Whether an adapter with the mean loss `theirs` may be mixed in.

    The limit is absolute: one relative to what others send (median and deviations) would refuse a tenth of the honest
    ones, this one refuses about none.

    Args:
      own: of our adapter on the same samples.
      before: of the one that our round began with. While all begin, whoever has odd data gets worse on the suite.
    """
    return theirs <= FACTOR * max(own, before) + SLACK  # false if any is not a number


def mix_passes(mix: float, own: float, before: float) -> bool:
    """The same for the mean of another's adapter and ours, where every node knows another part of the suite.

    There a single honest adapter is bad at most of it: judged by themselves, half of them were refused with four
    nodes that had two of seven classes each; of their mixes one in a hundred, with FACTOR.
    """
    return mix <= MIX_FACTOR * max(own, before) + SLACK


def draw(total: int, delta: str, round_number: int, count: int = DRAWN) -> tuple[int, ...]:
    """Which of `total` samples of the suite judge a delta, ascending: the same for everybody.

    Args:
      delta: its CID, which nobody can choose together with what it hashes to.
    """
    stem = f"meshnode/gate/1:{round_number}:{delta}:"
    ranked = sorted(range(total), key=lambda index: sha256(f"{stem}{index}".encode()).digest())
    return tuple(sorted(ranked[:count]))
