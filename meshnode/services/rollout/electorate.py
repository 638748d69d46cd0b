"""What everybody says of adapters, as far as it can be used, and who counts."""

from __future__ import annotations

from typing import Final, TypeVar

from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Watch
from meshnode.services.port import Adverts, Electors, Notices
from protocols.codec import decode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership.messages import TRAIN, VOTE
from protocols.notice.messages import BALLOT, CANDIDATE, LIVE, REVOCATION
from protocols.rollout.count import People, Words
from protocols.rollout.messages import Ballots, Candidates, Content, Revocations, Tallies, check_content

KINDS: Final[dict[type[Content], str]] = {
    Candidates: CANDIDATE,
    Ballots: BALLOT,
    Tallies: LIVE,
    Revocations: REVOCATION,
}

T = TypeVar("T", Candidates, Ballots, Tallies, Revocations)

_log = get_logger("rollout")


class Electorate:
    """Reads notices and the roll of members."""

    def __init__(self, notices: Notices, adverts: Adverts, members: Electors, health: Health) -> None:
        self._notices = notices
        self._adverts = adverts
        self._members = members
        self._health = health
        self._read: dict[tuple[str, PeerId], tuple[bytes, Content | None]] = {}

    def watch(self) -> Watch:
        """Wakes whoever waits for it when `words` or `people` may say something else."""
        return Watch(self._notices.changes, self._adverts.changes, self._members.changes)

    def words(self) -> Words:
        """Contents that hold; the others count as unsaid, and their signers are named."""
        return Words(
            candidates=self._of(Candidates),
            ballots=self._of(Ballots),
            tallies=self._of(Tallies),
            revocations=self._of(Revocations),
        )

    def _of(self, kind: type[T]) -> dict[PeerId, T]:
        found = {}
        for peer, data in self._notices.all(KINDS[kind]).items():
            before = self._read.get((KINDS[kind], peer))
            if before is None or before[0] != data:
                before = self._read[KINDS[kind], peer] = data, self._decoded(kind, peer, data)
            if isinstance(before[1], kind):
                found[peer] = before[1]
        return found

    def _decoded(self, kind: type[T], peer: PeerId, data: bytes) -> T | None:
        if not data:
            return None  # taken back
        try:
            content = decode(kind, data)
            check_content(content, peer)
        except RemoteProtocolError as error:
            _log.warning("words.refused", peer=peer, kind=KINDS[kind], reason=str(error))
            self._health.set("release-words", peer=short(peer), kind=KINDS[kind], reason=str(error))
            return None
        return content

    def people(self, words: Words) -> People:
        """Members with a vote that are there or are heard, and everybody who is there."""
        present = frozenset(self._adverts.live())
        heard = present | words.ballots.keys() | words.revocations.keys()
        voters = {peer: self._members.branch_of(peer) for peer in sorted(heard) if self.may_vote(peer)}
        return People(
            voters=voters,
            founders=frozenset(voter for voter in voters if self._members.is_founder(voter)),
            present=present,
        )

    def may_vote(self, peer: PeerId) -> bool:
        """Whether its certificate says so, now."""
        return VOTE in self._members.roles_of(peer)

    def may_propose(self, peer: PeerId) -> bool:
        """The same for proposing adapters."""
        return TRAIN in self._members.roles_of(peer)
