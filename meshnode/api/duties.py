"""Orders of a node's owner: pause, drain, resume."""

from __future__ import annotations

from typing import Any, Final

from meshnode.api.messages import DutyStatus
from meshnode.api.status import duty_status
from meshnode.core.durations import MAX_S
from meshnode.core.errors import BadRequest
from meshnode.node import Node
from meshnode.policy.duty import Duty

ORDERS: Final = {"pause": Duty.PAUSED, "drain": Duty.DRAINED, "resume": Duty.FULL}


def obey(node: Node, order: str, seconds: Any = 0) -> DutyStatus:
    """Carry out one of `ORDERS`; what holds now. Raises BadRequest, DiskError."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_S:
        raise BadRequest(
            f"seconds is {repr(seconds)[:40]}; it takes a number from 0 (until somebody says resume) to {MAX_S}"
        )
    node.owner.give(ORDERS[order], seconds)
    return duty_status(node)
