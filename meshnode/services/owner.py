"""What the owner has this node do: everything, no background work (`meshnode pause`), or nothing (`meshnode drain`);
by order, or by the rule of `[owner]` and what the device does at the moment. Of the two the stricter counts.

Whoever works in the background or serves asks here; others see it among the tags of our advert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.durations import format_duration
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.policy.duty import Duty, Standing, tags_for
from meshnode.policy.idle import DeviceFacts
from meshnode.policy.owner_first import OwnerFirst, OwnerRule, can_apply
from meshnode.services.port import Directory
from meshnode.state.port import Records
from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError

KIND: Final = "order"
LOOK_S: Final = 20.0  # between looks at the device
MAX_SLEEP_S: Final = 600.0  # the wall clock may be set meanwhile

_log = get_logger("owner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What somebody has asked for; kept in the state file, so that a restart does not undo it."""

    duty: int = at(1, low=Duty.PAUSED, high=Duty.DRAINED)
    since_ms: int = at(2)
    until_ms: int = at(3)  # 0: until somebody says `resume`


class OwnerService:
    """`Owner` of services/port.py. Owns the tags `paused` and `drained` of our advert."""

    name = "owner"

    def __init__(
        self,
        directory: Directory,
        state: Records,
        wall: Wall,
        facts: Callable[[], DeviceFacts],
        rule: OwnerRule,
    ) -> None:
        """What was ordered before the last stop holds from the first advert on.

        Args:
          facts: what the device does; loads are averages since it was asked before.
        """
        self._directory = directory
        self._state = state
        self._wall = wall
        self._order = self._kept()
        self._facts = facts
        self._rule = rule
        self._first = OwnerFirst(rule)
        self._by_rule = Standing()
        self._standing = Standing()
        self.changes = Changes()
        self._look()
        if not self.duty.serves:  # nobody is to plan with us before placement has looked
            directory.advertise(replace(directory.me(), memory_bytes=0))

    @property
    def duty(self) -> Duty:
        """See `Owner`."""
        return self._standing.duty

    @property
    def why(self) -> str:
        """See `Owner`."""
        return self._judge(self._wall()).why

    @property
    def order(self) -> Order | None:
        """What was asked for and holds; None: nothing."""
        return self._order

    def give(self, duty: Duty, seconds: float = 0.0) -> None:
        """Do this much from now on, for so many seconds; 0: until something else is asked for. Raises DiskError."""
        now = self._wall()
        until = now + int(seconds * 1000) if seconds else 0
        self._order = None if duty is Duty.FULL else Order(duty=duty, since_ms=now, until_ms=until)
        if self._order is None:
            self._state.remove_record(KIND, KIND)
        else:
            self._state.put_record(KIND, KIND, encode(self._order))
        self._look()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Notice when an order runs out, and what the device does, until cancelled."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            if can_apply(self._facts(), self._rule):
                nursery.start_soon(self._watch_device)
            while True:
                version = self.changes.version
                with trio.move_on_after(self._look()):
                    await self.changes.wait(version)

    async def _watch_device(self) -> None:
        while True:
            await trio.sleep(LOOK_S)
            self._by_rule = self._first.look(self._facts(), trio.current_time())
            self._look()

    def _kept(self) -> Order | None:
        data = self._state.record(KIND, KIND)
        try:
            return None if data is None else decode(Order, data)
        except RemoteProtocolError as error:
            _log.warning("order.unreadable", reason=str(error))
            return None

    def _look(self) -> float:
        """Work out what holds now. Seconds until it is time to look again."""
        now = self._wall()
        if self._order is not None and 0 < self._order.until_ms <= now:
            self.give(Duty.FULL)
            return inf
        standing = self._judge(now)
        changed = standing.duty is not self._standing.duty
        self._standing = standing
        if changed:
            _log.info("duty.changed", duty=standing.duty.word, why=standing.why)
            self._say(standing.duty)
            self.changes.notify()
        if self._order is None or not self._order.until_ms:
            return inf
        return min(MAX_SLEEP_S, (self._order.until_ms - now) / 1000)

    def _judge(self, now: int) -> Standing:
        ordered = Standing() if self._order is None else _standing_of(self._order, now)
        return max(ordered, self._by_rule, key=lambda standing: standing.duty)

    def _say(self, duty: Duty) -> None:
        me = self._directory.me()
        self._directory.advertise(replace(me, tags=tags_for(duty, me.tags)))


def _standing_of(order: Order, now: int) -> Standing:
    duty = Duty(order.duty)
    ends = f", for {format_duration((order.until_ms - now) / 1000)} more" if order.until_ms else ""
    return Standing(duty, f"somebody asked for it{ends}; `meshnode resume` ends it")
