"""One round's cohort, carried out: words by notices, masked vectors by content address (protocols/cohort)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable, ModelError
from meshnode.core.log import get_logger
from meshnode.services.learning.exchange import Exchange
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.report import Report
from protocols.codec import encode
from protocols.cohort.cohorts import LEAST, Cohort, cohorts_of
from protocols.cohort.events import (
    Begin,
    Blame,
    Effect,
    Event,
    Expired,
    Fail,
    Fetch,
    Fetched,
    Heard,
    Mask,
    Say,
    Stored,
    Unmask,
)
from protocols.cohort.machine import CohortMachine, Rules
from protocols.cohort.masking import Pads, Sum, masked
from protocols.cohort.messages import COHORT_RECORD, Word, Words, open_word, read_words
from protocols.delta.frame import Vector
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, cid_to_bytes, short
from protocols.manifest.messages import FileRef
from protocols.notice.messages import COHORT
from protocols.round.schedule import order_of

MAX_EVENTS: Final = 4096
STEP_S: Final = 30.0  # most for one step of a cohort, once all have trained
TURNS: Final = 10  # in a step

_log = get_logger("learning")


def rules_of(wait_s: float, parameters: int) -> Rules:
    """A cohort has come to its end before other cohorts have waited `wait_s` for what it gives."""
    step = min(STEP_S, wait_s / 16)
    return Rules(parameters=parameters, wait_s=wait_s / 2, step_s=step, turn_s=step / TURNS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cohort has come to."""

    mean: Vector | None  # of what its members have put in; None: there is none
    included: bool  # whether ours is in it


class Cohorts:
    """The cohorts of one lineage that this node is in, one after the other."""

    def __init__(self, ground: Ground, exchange: Exchange, lineage: str, rules: Rules, report: Report) -> None:
        """`exchange`: keeps masked vectors, and is told of whoever did what no honest member does."""
        self._ground = ground
        self._exchange = exchange
        self._lineage = lineage
        self._rules = rules
        self._report = report
        self._said: tuple[bytes, ...] = ()  # our last word of the round before

    async def mean(
        self, round_number: int, participants: tuple[PeerId, ...], behind: frozenset[PeerId], vector: Vector
    ) -> Outcome:
        """The mean of a vector of ours and those of the others in our cohort. It takes minutes when some are late.

        Args:
          behind: participants that have missed a round.

        Raises DiskError; LocalProtocolError when the training has diverged; Declined when we may not train any more.
        """
        order = order_of(participants, self._lineage, round_number)
        ours = next((cohort for cohort in cohorts_of(order) if self._ground.us in cohort), None)
        if ours is None:
            return self._none(round_number, f"a cohort takes {LEAST} devices; {len(participants)} take part")
        members = tuple(PeerId(peer) for peer in ours)
        cohort = Cohort.of(self._lineage, round_number, members)
        machine = CohortMachine(self._ground.us, cohort, self._rules, secrets.token_bytes(32))
        run = _Run(self._ground, self._exchange, machine, vector, self._said)
        async with trio.open_nursery() as nursery:
            await run.to_its_end(behind, nursery)
            nursery.cancel_scope.cancel()
        self._said = run.said[:1]
        self._report.sent_bytes += run.sent_bytes
        self._report.fetched_bytes += run.fetched_bytes
        for peer, reason in run.blamed:
            self._exchange.caught(peer)
            self._report.refuse("cohort", f"{short(peer)} is left alone: {reason}")
        for sentence in run.unread:
            self._report.refuse("cohort", sentence)
        if run.mean is None:
            return self._none(round_number, run.failed)
        _log.info("learning.cohort", round=round_number, members=len(members), survivors=run.survivors)
        return Outcome(run.mean, machine.included)

    def _none(self, round_number: int, reason: str) -> Outcome:
        self._report.refuse("no-mean", f"round {round_number} has no masked mean: {reason}")
        _log.info("learning.no_mean", round=round_number, reason=reason)
        return Outcome(None, included=False)


class _Run:
    """One machine, from its begin to its last order."""

    def __init__(
        self,
        ground: Ground,
        exchange: Exchange,
        machine: CohortMachine,
        vector: Vector,
        before: tuple[bytes, ...],
    ) -> None:
        self._ground = ground
        self._exchange = exchange
        self._machine = machine
        self._vector = vector
        self._before = before
        self._heard: set[bytes] = set()  # signed words that the machine knows, or that can't be read
        self._send, self._receive = trio.open_memory_channel[Event](MAX_EVENTS)
        self.said: tuple[bytes, ...] = ()
        self.mean: Vector | None = None
        self.survivors = 0
        self.failed = ""
        self.blamed: list[tuple[PeerId, str]] = []
        self.unread: list[str] = []
        self.sent_bytes = 0
        self.fetched_bytes = 0

    async def to_its_end(self, behind: frozenset[PeerId], nursery: trio.Nursery) -> None:
        """Until there is a mean, or none. Raises, from here or in the nursery, DiskError and what signing raises."""
        nursery.start_soon(self._listen)
        await self._handle(Begin(behind), nursery)
        while self.mean is None and not self.failed:
            event: Event = Expired()
            deadline = self._machine.deadline
            with trio.move_on_at(deadline if deadline is not None else float("inf")):
                event = await self._receive.receive()
            if self._machine.expects(event):
                await self._handle(event, nursery)

    async def _listen(self) -> None:
        changes = self._ground.notices.changes
        while True:
            version = changes.version
            for peer, content in self._ground.notices.all(COHORT).items():
                if peer != self._ground.us and content:
                    for word in self._read(peer, content):
                        await self._send.send(Heard(word))
            await changes.wait(version)

    def _read(self, peer: PeerId, content: bytes) -> list[Word]:
        """The words in a notice that are new, oldest first."""
        words: list[Word] = []
        try:
            for signed in reversed(read_words(content)):
                if signed not in self._heard:
                    self._heard.add(signed)
                    word = open_word(signed)
                    if word.peer != peer:
                        raise RemoteProtocolError(f"{short(peer)} gave notice of a word of {short(word.peer)}.")
                    words.append(word)
        except RemoteProtocolError as error:
            self.unread.append(str(error))
        return words

    # ------------------------------------------------------------ orders

    async def _handle(self, event: Event, nursery: trio.Nursery) -> None:
        for effect in self._machine.handle(event, trio.current_time()):
            await self._carry_out(effect, nursery)

    async def _carry_out(self, effect: Effect, nursery: trio.Nursery) -> None:
        match effect:
            case Say(word=word):
                signed = self._ground.signer.sign(COHORT_RECORD, encode(word))
                self.said = (signed, *self._before)
                self._ground.notices.give(COHORT, encode(Words(signed=self.said)))
            case Mask(pads=pads):
                nursery.start_soon(self._mask, pads)
            case Fetch(peer=peer, cid=cid, size=size):
                nursery.start_soon(self._fetch, peer, FileRef(cid=cid, size=size))
            case Unmask():
                await self._unmask(effect)
            case Blame(peer=peer, reason=reason):
                self.blamed.append((peer, reason))
            case Fail(reason=reason):
                self.failed = reason

    async def _mask(self, pads: Pads) -> None:
        payload = await self._ground.workers.run(masked, self._vector, pads)
        cid = await self._exchange.keep_masked(payload)
        self.sent_bytes += len(payload)
        await self._send.send(Stored(cid_to_bytes(cid), len(payload)))

    async def _fetch(self, peer: PeerId, file: FileRef) -> None:
        try:
            await self._ground.content.fetch(file)
        except (ContentUnavailable, ModelError) as error:
            _log.info("learning.masked_unavailable", peer=short(peer), reason=str(error))
            return
        self.fetched_bytes += file.size
        await self._send.send(Fetched(peer))

    async def _unmask(self, order: Unmask) -> None:
        ground, total = self._ground, Sum(self._vector.size)

        def add(path: Path) -> None:
            total.add(path.read_bytes())

        try:
            for masked_file in order.files:
                with await ground.content.open(FileRef(cid=masked_file.name, size=masked_file.size)) as path:
                    await ground.workers.run(add, path)
            self.mean = await ground.workers.run(total.mean, order.pads)
        except (ContentUnavailable, ModelError, OSError) as error:
            self.failed = f"a masked vector can't be read: {error}"
        except RemoteProtocolError as error:
            self.failed = str(error)
        self.survivors = len(order.survivors)
