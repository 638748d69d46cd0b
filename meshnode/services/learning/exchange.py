"""Deltas on their way: ours are stored and announced; others' are fetched and checked, the cheap things first.

What is refused is counted by its reason. A peer whose deltas were refused for what they contained is not asked for a
while; one that signed two deltas for one position is left alone for a day, and everybody is told the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import trio

from meshnode.core.errors import ContentUnavailable, ModelError
from meshnode.policy.reputation import Reputation
from meshnode.policy.robust import CAP, ENOUGH
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.report import Report
from meshnode.services.learning.worker import Round
from protocols.codec import encode
from protocols.delta.checks import Expected, Refusal, judge_payload, judge_record
from protocols.delta.codec import Packed
from protocols.delta.evidence import read_evidence, write_evidence
from protocols.delta.frame import Vector
from protocols.delta.lineage import Lineage
from protocols.delta.messages import (
    DELTA_RECORD,
    MAX_PARENTS,
    MAX_RECENT,
    Codec,
    DeltaRecord,
    Equivocation,
    Made,
    Position,
    Privacy,
    open_delta,
    record_cid,
)
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, PeerId, cid_from_bytes, cid_to_bytes, short
from protocols.manifest.messages import FileRef
from protocols.membership.messages import TRAIN
from protocols.notice.messages import DELTA, EVIDENCE
from protocols.round.events import Input

KEPT_NORMS: Final = 64


@dataclass(frozen=True, slots=True)
class Told:
    """What the record of a delta says about the training before it."""

    steps: int = 0
    samples: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    privacy: Privacy | None = None


def told_of(done: Round) -> Told:
    """What others may know of a round. Of a private one they learn neither the losses nor how many samples there are:
    nobody has added noise to those."""
    losses, terms = done.trained.losses, done.terms
    if terms is None:
        return Told(len(losses), done.samples, losses[0], losses[-1])
    privacy = Privacy(
        epsilon_milli=_milli(terms.epsilon),
        delta_nano=max(1, round(1e9 * terms.delta)),
        sigma_milli=max(1, _milli(terms.sigma)),
        clip_milli=max(1, _milli(terms.clip)),
    )
    return Told(len(losses), privacy=privacy)


@dataclass(frozen=True, slots=True)
class Offered:
    """A delta that a record names."""

    made: Made
    codec: Codec
    record: Cid


class Exchange:
    """The deltas of one lineage."""

    def __init__(
        self, ground: Ground, expected: Callable[[], Expected], codec: Codec, report: Report, folder: Path
    ) -> None:
        """
        Args:
          expected: what deltas look like at this moment.
          codec: of our own.
          folder: for what is on its way into the store.
        """
        self._ground = ground
        self._expected = expected
        self._codec = codec
        self._report = report
        self._folder = folder
        self._pin = f"learning-{expected().frame}"
        self._lineage = Lineage(expected().frame)
        self._seen: dict[PeerId, bytes] = {}  # the last content of each peer's notice
        self._testimony: dict[PeerId, bytes] = {}  # the same of its evidence
        self._found: list[Equivocation] = []  # by ourselves
        self._last: dict[PeerId, DeltaRecord] = {}  # that was accepted
        self._offers: dict[PeerId, dict[Cid, Offered]] = {}
        self._reputations: dict[PeerId, Reputation] = {}
        self._norms: list[float] = []  # of deltas that were used

    # ------------------------------------------------------------ ours

    async def publish(
        self,
        position: Position,
        packed: Packed,
        *,
        whole: Packed | None,
        told: Told,
        parents: tuple[Cid, ...],
        recent: list[tuple[int, int, str, int]],
    ) -> tuple[Made, Cid]:
        """Store a delta and tell everybody. What was made, and the CID of its record.

        Args:
          whole: for the mode broadcast, the whole difference from the base.
          parents: records of the deltas that went into it.
          recent: our deltas before, newest first.

        Raises DiskError; Declined when this node may not train.
        """
        ground, expected = self._ground, self._expected()
        made = await self._store(position, packed)
        whole_made = None if whole is None else await self._store(position, whole)
        record = DeltaRecord(
            peer=ground.us,
            frame=cid_to_bytes(expected.frame),
            base=b"" if expected.base is None else cid_to_bytes(expected.base),
            made=made,
            codec=self._codec,
            adds=whole is not None,
            whole=whole_made,
            parents=tuple(sorted({cid_to_bytes(parent) for parent in parents})[:MAX_PARENTS]),
            steps=told.steps,
            samples=told.samples,
            loss_before_milli=_milli(told.loss_before),
            loss_after_milli=_milli(told.loss_after),
            privacy=told.privacy,
            recent=tuple(
                Made(round=r, exchange=e, cid=cid_to_bytes(Cid(cid)), size=size) for r, e, cid, size in recent
            )[:MAX_RECENT],
        )
        signed = ground.signer.sign(DELTA_RECORD, encode(record))
        self._lineage.add(signed, record)
        kept = [cid_from_bytes(one.cid) for one in (made, *record.recent, *((whole_made,) if whole_made else ()))]
        await ground.workers.run(ground.store.pin_only, self._pin, kept)
        ground.notices.give(DELTA, signed)
        self._report.published += 1
        self._report.sent_bytes += made.size
        return made, record_cid(signed)

    async def _store(self, position: Position, packed: Packed) -> Made:
        cid = await self._ground.keep(packed.payload, self._folder, self._pin)
        return Made(round=position.round, exchange=position.exchange, cid=cid_to_bytes(cid), size=len(packed.payload))

    def given_away(self) -> int:
        """The last round of which we gave away a delta, as others know it, or -1: never another one for that round,
        even if our own page is lost."""
        content = self._ground.notices.all(DELTA).get(self._ground.us)
        try:
            record = open_delta(content) if content else None
        except RemoteProtocolError:
            record = None
        return record.made.round if record is not None and record.frame_cid == self._expected().frame else -1

    async def keep_masked(self, payload: bytes) -> Cid:
        """Store our masked vector of this round, in place of the one before. Raises DiskError."""
        ground, pin = self._ground, f"cohort-{self._expected().frame}"
        cid = await ground.keep(payload, self._folder, pin)
        await ground.workers.run(ground.store.pin_only, pin, (cid,))
        return cid

    # ------------------------------------------------------------ theirs: records

    def look(self) -> tuple[list[DeltaRecord], list[PeerId]]:
        """The records that are new and pass their checks; and peers that were caught since the last time."""
        fresh: list[DeltaRecord] = []
        caught = self._hear()
        for peer, content in self._ground.notices.all(DELTA).items():
            if peer == self._ground.us or not content or self._seen.get(peer) == content:
                continue
            self._seen[peer] = content
            record = self._read(peer, content)
            if record is None:
                continue
            proof = self._lineage.add(content, record)
            if proof is not None:
                self.caught(peer)
                self._report.refuse("equivocated", f"{short(peer)} signed two deltas for one place of a round")
                caught.append(peer)
                self._found.append(proof)
                self._ground.notices.give(EVIDENCE, write_evidence(self._found))
                continue
            if self._reputation(peer).banned(trio.current_time()):
                continue  # it takes no part, as everybody knows
            if self._accepted(peer, record, record_cid(content)):
                fresh.append(record)
        return fresh, caught

    def _hear(self) -> list[PeerId]:
        """What others can prove, or we before a restart; peers that were caught by it."""
        caught: list[PeerId] = []
        for witness, content in self._ground.notices.all(EVIDENCE).items():
            if not content or self._testimony.get(witness) == content:
                continue
            self._testimony[witness] = content
            try:
                heard = read_evidence(content)
            except RemoteProtocolError as error:
                self._report.refuse("evidence", f"{short(witness)} accuses somebody of lying, without proof: {error}")
                self.judged(witness, used=False)
                continue
            for proof, records in heard:
                if proof.frame != self._expected().frame or not self._lineage.convict(proof.peer, records):
                    continue
                if witness == self._ground.us:
                    self._found.append(records)
                who = "this node, as if two ran with its key," if proof.peer == self._ground.us else short(proof.peer)
                self._report.refuse(
                    "equivocated",
                    f"{who} signed two deltas for one place of a round, as {short(witness)} proves",
                )
                if proof.peer != self._ground.us:
                    self.caught(proof.peer)
                    caught.append(proof.peer)
        return caught

    def _read(self, peer: PeerId, content: bytes) -> DeltaRecord | None:
        """The record in a notice; None when it can't be read."""
        try:
            record = open_delta(content)
            if record.peer != peer:
                raise RemoteProtocolError(f"{short(peer)} gave notice of a delta of {short(PeerId(record.peer))}.")
        except RemoteProtocolError as error:
            self._report.refuse("record", str(error))
            return None
        return record

    def _accepted(self, peer: PeerId, record: DeltaRecord, cid: Cid) -> bool:
        refusal = judge_record(
            record,
            self._expected(),
            may_train=self._ground.rights.has(peer, TRAIN),
            last=self._last.get(peer),
        )
        if refusal is not None:
            self._refuse(peer, refusal)
            return False
        self._last[peer] = record
        codec = Codec(record.codec)
        oldest = record.made.round - 2 * MAX_RECENT
        offers = {delta: offer for delta, offer in self._offers.get(peer, {}).items() if offer.made.round >= oldest}
        for made in (record.made, *record.recent):
            offers.setdefault(cid_from_bytes(made.cid), Offered(made, codec, cid))
        if record.whole is not None:
            offers.setdefault(cid_from_bytes(record.whole.cid), Offered(record.whole, Codec.INT8, cid))
        self._offers[peer] = offers
        return True

    def _refuse(self, peer: PeerId, refusal: Refusal) -> None:
        self._report.refuse(refusal.why.value, refusal.sentence)
        if refusal.why.hostile:
            self.judged(peer, used=False)

    # ------------------------------------------------------------ theirs: bytes

    async def fetch(self, peer: PeerId, delta: Cid, own_norm: float) -> Vector | str:
        """What a delta says, or why it is not used.

        Args:
          own_norm: of our own difference from the base.
        """
        offered = self._offers.get(peer, {}).get(delta)
        if offered is None:
            return "its record is gone"
        if not self._reputation(peer).trusted(trio.current_time()):
            self._report.refuse("reputation", f"{short(peer)} is not asked: its deltas before could not be used")
            return "its deltas before could not be used"
        made = offered.made
        try:
            file = await self._ground.content.open(FileRef(cid=delta, size=made.size))
            try:
                payload = await self._ground.workers.run(file.path.read_bytes)
            finally:
                file.close()
        except (ContentUnavailable, ModelError, OSError) as error:
            self._report.refuse("unavailable", f"the delta of {short(peer)} can't be had: {error}")
            return "its delta can't be had"
        self._report.fetched_bytes += len(payload)
        most = self._most_norm(own_norm) if made.size else inf
        judged = judge_payload(payload, made, offered.codec, self._expected(), most_norm=most, who=peer)
        if isinstance(judged, Refusal):
            self._refuse(peer, judged)
            return judged.sentence
        return judged

    def _most_norm(self, own_norm: float) -> float:
        """What a difference from the base may have at most: what is usual, or our own, whichever is more."""
        if len(self._norms) < ENOUGH:
            return inf
        return CAP * max(own_norm, median(self._norms))

    # ------------------------------------------------------------ what becomes of them

    def used(self, given: Input, vector: Vector) -> None:
        """A delta went into our adapter."""
        self._norms = [*self._norms, float(np.linalg.norm(vector))][-KEPT_NORMS:]
        self._report.mixed += 1
        self.judged(given.peer, used=True)

    def judged(self, peer: PeerId, *, used: bool) -> None:
        """A delta of a peer was used, or refused for what it contained."""
        self._reputations[peer] = self._reputation(peer).after(used)

    def caught(self, peer: PeerId) -> None:
        """A peer did what no honest one does, and its signature proves it."""
        self._reputations[peer] = self._reputation(peer).proved(trio.current_time())

    def round_over(self) -> None:
        """What peers did counts less."""
        self._reputations = {peer: reputation.faded() for peer, reputation in self._reputations.items()}

    def record_of(self, given: Input) -> Cid | None:
        """The record that named a delta."""
        offered = self._offers.get(given.peer, {}).get(given.delta)
        return None if offered is None else offered.record

    def _reputation(self, peer: PeerId) -> Reputation:
        return self._reputations.get(peer, Reputation())

    @property
    def reputations(self) -> Mapping[PeerId, Reputation]:
        return self._reputations


def _milli(loss: float) -> int:
    return max(0, round(1000 * loss)) if np.isfinite(loss) else 0
