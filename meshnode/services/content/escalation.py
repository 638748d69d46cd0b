"""After how long without a block a fetch asks whom, and when it gives up."""

from __future__ import annotations

from typing import Final

OFFER_S: Final = 0.5  # how often a fetch looks for new providers
GUEST_S: Final = 1.5  # a fetch that got no block from members for so long asks guests
SEEK_S: Final = 2.5  # a fetch that got no block from anybody for so long has further peers looked for
OUTSIDE_S: Final = 3.0  # without a block from a peer, until sources outside the mesh are asked
ACQUAINTED_S: Final = 10.0  # after the start, who has what is known; before, nobody known means nothing
PATIENCE_S: Final = 30.0  # without one verified block, until a fetch gives up
SEARCH_PATIENCE_S: Final = 60.0  # the same where strangers are looked for, which takes its time


def outside_after_s(online_s: float, *, others: bool) -> float:
    """Seconds without a block until sources outside the mesh are asked; 0 where nobody else could have it.

    Args:
      online_s: seconds since we began to exchange blocks.
      others: somebody advertises it, or a guest is connected.
    """
    return OUTSIDE_S if others or online_s < ACQUAINTED_S else 0.0
