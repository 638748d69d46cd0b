"""Our own place in the network: whether our certificate still holds, and what people are told when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from meshnode.core.errors import IdentityError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from protocols.membership import Standing, Untrusted

REJOIN: Final = "With a new ticket, run `meshnode join TICKET --anew` on this device."

_log = get_logger("membership")


def not_a_member(why: Untrusted) -> IdentityError:
    """What is said wherever our own certificate is needed and does not hold."""
    return IdentityError(f"this node is no member of the network any more: {why}. {REJOIN}")


class Place:
    """Says it while a node runs: it may be put out, or its certificate may expire."""

    def __init__(self, standing: Callable[[], Standing], health: Health) -> None:
        """`standing`: of this node; raises Untrusted when its certificate does not hold."""
        self._standing = standing
        self._health = health
        self._lost = False

    def look(self) -> None:
        """Judge our certificate anew."""
        try:
            self._standing()
        except Untrusted as why:
            if not self._lost:
                _log.error("membership.lost", reason=str(why))
            self._lost = True
            self._health.set("put-out", reason=str(why))
        else:
            self._lost = False
            self._health.clear("put-out")
