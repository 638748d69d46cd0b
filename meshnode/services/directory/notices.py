"""What this node tells everybody beside its advert: one notice of each kind, renewed for as long as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined
from meshnode.core.signal import Changes
from meshnode.membership.rights import demand
from meshnode.net.port import Host
from meshnode.services.directory.book import RecordBook
from meshnode.services.port import Members, RecordSigner
from meshnode.state.port import Records
from protocols.advert.messages import RENEWALS
from protocols.codec import encode
from protocols.errors import LocalProtocolError
from protocols.ids import PeerId
from protocols.notice.messages import HOLDS_S, MAX_CONTENT_BYTES, ROLE_OF, Notice

NOTICE: Final = "notice"  # kind of durable record; the "signer" is the kind of the notice
REPEAT_S: Final = (0.0, 1.0, 2.0)  # a notice is gossiped at once and again; afterwards sync repairs


@dataclass(slots=True)
class _Given:
    """A notice of ours, and when it is to be gossiped again."""

    record: bytes
    again: list[float]


class NoticesService:
    """`Notices` of services/port.py."""

    name = "notices"

    def __init__(
        self,
        host: Host,
        topic: str,
        signer: RecordSigner,
        members: Members,
        book: RecordBook,
        records: Records,
        wall: Wall,
    ) -> None:
        """`topic`: of the gossip. `records`: our notices outlive a restart there."""
        self._host = host
        self._topic = topic
        self._signer = signer
        self._members = members
        self._book = book
        self._records = records
        self._wall = wall
        self._given: dict[str, _Given] = {}
        self._due = Changes()

    @property
    def changes(self) -> Changes:
        """Whenever a notice says something else."""
        return self._book.noticed

    def all(self, kind: str) -> Mapping[PeerId, bytes]:
        """See services/port.py."""
        return self._book.notices(kind)

    def give(self, kind: str, content: bytes) -> None:
        """See services/port.py."""
        us = self._host.peer_id
        demand(self._members.roles_of(us), ROLE_OF[kind], f"give notice of a {kind}")
        if len(content) > MAX_CONTENT_BYTES:
            raise LocalProtocolError(f"a {kind} of {len(content)} bytes; the limit is {MAX_CONTENT_BYTES}")
        known = self._book.get(kind, us)
        before = known.version[0] if known is not None else 0
        notice = Notice(peer=us, incarnation=max(self._wall(), before + 1), sequence=0, kind=kind, content=content)
        payload = encode(notice)
        record = self._signer.sign(kind, payload)
        self._records.put_record(NOTICE, kind, content)
        self._book.write(kind, notice, payload, record)
        now = trio.current_time()
        self._given[kind] = _Given(record, [*(now + wait for wait in REPEAT_S), now + HOLDS_S / RENEWALS])
        self._due.notify()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Give what was given before the restart, gossip what is new, renew what stands; until cancelled."""
        task_status.started()
        for kind, content in self._records.records(NOTICE).items():
            if kind in ROLE_OF and kind not in self._given:
                self._give_again(kind, content)
        while True:
            version = self._due.version
            for kind in [kind for kind, given in self._given.items() if given.again[0] <= trio.current_time()]:
                await self._gossip(kind)
            with trio.move_on_at(min((given.again[0] for given in self._given.values()), default=float("inf"))):
                await self._due.wait(version)

    async def _gossip(self, kind: str) -> None:
        given = self._given[kind]
        given.again.pop(0)
        if given.again:
            await self._host.publish(self._topic, given.record)
        else:
            self._give_again(kind, self._records.record(NOTICE, kind) or b"")

    def _give_again(self, kind: str, content: bytes) -> None:
        try:
            self.give(kind, content)
        except Declined:  # a role that was taken away; the word stays, for it may come back
            self._given.pop(kind, None)
