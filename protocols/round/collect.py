"""The deltas that one exchange needs: whom we wait for, what is being fetched, what is here.

`Partners` takes whole adapters of few peers, one of each; `Updates` takes the change of every round of everybody,
each exactly once, however late. Both have the same methods, so the machine need not tell one from the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from typing import Final

from protocols.delta.messages import MAX_RECENT, DeltaRecord, Made, Position
from protocols.ids import Cid, PeerId
from protocols.round.events import Effect, Fetch, Input, Skip
from protocols.round.schedule import Partner

MAX_STALENESS: Final = 4  # rounds: a late partner's last delta is taken instead if it is not older


def newest_whole(records: Collection[DeltaRecord], count: int, lineage: str) -> tuple[tuple[PeerId, Made], ...]:
    """Whole adapters for a newcomer: of the newest, some that nobody chose."""
    newest = sorted(
        records,
        key=lambda r: (-r.made.round, sha256(f"meshnode/adopt/1:{lineage}:{r.peer}".encode()).digest()),
    )
    return tuple((PeerId(record.peer), record.whole or record.made) for record in newest[:count])


def behind(record: DeltaRecord, at: Position) -> bool:
    """Whether a peer has missed a round already."""
    return record.made.round < at.round - 1


@dataclass(slots=True)
class _Want:
    weight: Fraction
    asked: Made | None = None  # which of its deltas is being fetched, or is here
    here: bool = False


class Partners:
    """One whole adapter of each partner: of this position or newer, and one that we have not taken before."""

    def __init__(self) -> None:
        self._wants: dict[PeerId, _Want] = {}
        self._used: dict[PeerId, Position] = {}  # the newest delta of each peer that we have taken
        self._at = Position(0, 0)

    def clear(self) -> None:
        """Nothing is wanted any more."""
        self._wants.clear()

    def since(self, round_number: int) -> None:
        """Whole adapters have no past."""

    @property
    def done(self) -> bool:
        """Whether nobody is waited for."""
        return all(want.here for want in self._wants.values())

    def adopt(self, wholes: Sequence[tuple[PeerId, Made]]) -> tuple[Effect, ...]:
        """Fetch these, for a start."""
        self._wants = {peer: _Want(Fraction(1, len(wholes)), made) for peer, made in wholes}
        return tuple(Fetch(peer, made.name) for peer, made in wholes)

    def begin(
        self, at: Position, partners: Sequence[Partner], records: Mapping[PeerId, DeltaRecord], *, patient: bool
    ) -> tuple[Effect, ...]:
        """An exchange begins. Unless we are `patient`, who is behind is not waited for."""
        self._at = at
        self._wants = {PeerId(partner.peer): _Want(partner.weight) for partner in partners}
        effects: tuple[Effect, ...] = ()
        for peer in list(self._wants):
            record = records.get(peer)
            if record is not None and not patient and behind(record, at):
                effects += self._older(peer, record)
            elif record is not None:
                effects += self.arrived(record)
        return effects

    def arrived(self, record: DeltaRecord) -> tuple[Effect, ...]:
        """A new record; its delta is fetched if it is waited for, of this very exchange if there still is one."""
        known = (record.made, *record.recent)
        exact = next((made for made in known if made.position == self._at), record.made)
        return self._ask(PeerId(record.peer), exact, self._at)

    def _ask(self, peer: PeerId, made: Made, least: Position) -> tuple[Effect, ...]:
        want = self._wants.get(peer)
        used = self._used.get(peer)
        if want is None or want.asked or made.position < least or (used is not None and made.position <= used):
            return ()
        want.asked = made
        return (Fetch(peer, made.name),)

    def fetched(self, peer: PeerId, delta: Cid) -> None:
        want = self._wants.get(peer)
        if want is not None and want.asked is not None and want.asked.name == delta:
            want.here = True

    def refused(self, peer: PeerId, delta: Cid, reason: str) -> tuple[Effect, ...]:
        want = self._wants.get(peer)
        if want is None or want.here or want.asked is None or want.asked.name != delta:
            return ()
        return self.lost(peer, reason)

    def lost(self, peer: PeerId, reason: str) -> tuple[Effect, ...]:
        """Go on without this peer, whatever it gave."""
        return (Skip(peer, reason),) if self._wants.pop(peer, None) else ()

    def late(self, records: Mapping[PeerId, DeltaRecord]) -> tuple[Effect, ...]:
        """It took too long: older deltas will do, and whoever has none is passed over."""
        unasked = [peer for peer, want in self._wants.items() if want.asked is None]
        return tuple(effect for peer in unasked for effect in self._older(peer, records.get(peer)))

    def _older(self, peer: PeerId, record: DeltaRecord | None) -> tuple[Effect, ...]:
        """Its last delta, if that is not too old and we have not taken it."""
        oldest = Position(max(0, self._at.round - MAX_STALENESS), 0)
        asked = self._ask(peer, record.made, oldest) if record is not None else ()
        return asked or self.lost(peer, "it was late, and has no older delta that we have not taken")

    def give_up(self) -> tuple[Effect, ...]:
        """Nobody is waited for any more."""
        missing = [peer for peer, want in self._wants.items() if not want.here]
        return tuple(effect for peer in missing for effect in self.lost(peer, "its delta did not come"))

    def take(self, round_number: int) -> tuple[Input, ...]:
        """What is here, in the order of the peers' names; nothing stays."""
        inputs = []
        for peer, want in sorted(self._wants.items()):
            assert want.asked is not None, "only deltas that were asked for are here"
            position = want.asked.position
            self._used[peer] = position
            behind = max(0, round_number - position.round)
            inputs.append(Input(peer, position, want.asked.name, want.weight, behind))
        self._wants = {}
        return tuple(inputs)


_NEVER: Final = 1 << 62
_Key = tuple[Position, PeerId]


class Updates:
    """The change of every round of every participant, each added exactly once, in whatever order they come."""

    def __init__(self) -> None:
        self._start = Partners()  # the whole adapter that a newcomer begins with
        self._since = _NEVER  # changes of earlier rounds are in our start; until we have one, nothing is fetched
        self._seen: set[_Key] = set()  # asked for, or done with
        self._fetching: dict[tuple[PeerId, Cid], list[_Key]] = {}
        self._ready: dict[_Key, Cid] = {}
        self._settled: dict[PeerId, int] = {}  # the newest round of which a peer's change is here, or refused
        self._awaited: set[PeerId] = set()
        self._at = Position(0, 0)

    def clear(self) -> None:
        """Nothing is wanted any more."""
        self._start.clear()
        for kept in (self._seen, self._fetching, self._ready, self._settled, self._awaited):
            kept.clear()
        self._since = _NEVER

    def since(self, round_number: int) -> None:
        """Our adapter holds all changes of the rounds before."""
        self._since = round_number

    @property
    def done(self) -> bool:
        """Whether nobody is waited for."""
        return self._start.done and all(self._settled.get(peer, -1) >= self._at.round for peer in self._awaited)

    def adopt(self, wholes: Sequence[tuple[PeerId, Made]]) -> tuple[Effect, ...]:
        """Fetch these, for a start."""
        return self._start.adopt(wholes)

    def begin(
        self, at: Position, partners: Sequence[Partner], records: Mapping[PeerId, DeltaRecord], *, patient: bool
    ) -> tuple[Effect, ...]:
        """An exchange begins. Unless we are `patient`, who is behind is not waited for."""
        self._at = at
        names = (PeerId(partner.peer) for partner in partners)
        self._awaited = {peer for peer in names if peer in records and (patient or not behind(records[peer], at))}
        return tuple(effect for _, record in sorted(records.items()) for effect in self.arrived(record))

    def arrived(self, record: DeltaRecord) -> tuple[Effect, ...]:
        """A new record; its delta, and earlier ones that it names, are fetched if we lack them."""
        peer = PeerId(record.peer)
        effects = []
        for made in (record.made, *record.recent):
            key = (made.position, peer)
            if made.round >= self._since and key not in self._seen:
                self._seen.add(key)
                cid = made.name
                keys = self._fetching.setdefault((peer, cid), [])
                keys.append(key)
                if len(keys) == 1:  # two rounds without a change have the same bytes
                    effects.append(Fetch(peer, cid))
        return tuple(effects)

    def fetched(self, peer: PeerId, delta: Cid) -> None:
        self._start.fetched(peer, delta)
        for key in self._fetching.pop((peer, delta), ()):
            self._ready[key] = delta
            self._settle(peer, key[0])

    def refused(self, peer: PeerId, delta: Cid, reason: str) -> tuple[Effect, ...]:
        effects = self._start.refused(peer, delta, reason)
        keys = self._fetching.pop((peer, delta), ())
        for key in keys:
            self._settle(peer, key[0])
        return (*effects, *((Skip(peer, reason),) if keys else ()))

    def _settle(self, peer: PeerId, position: Position) -> None:
        self._settled[peer] = max(self._settled.get(peer, -1), position.round)

    def lost(self, peer: PeerId, reason: str) -> tuple[Effect, ...]:
        """Go on without this peer, whatever it gave."""
        effects = self._start.lost(peer, reason)
        self._ready = {key: delta for key, delta in self._ready.items() if key[1] != peer}
        self._fetching = {name: keys for name, keys in self._fetching.items() if name[0] != peer}
        awaited = peer in self._awaited
        self._awaited.discard(peer)
        return effects or ((Skip(peer, reason),) if awaited else ())

    def late(self, records: Mapping[PeerId, DeltaRecord]) -> tuple[Effect, ...]:
        """It took too long. What is late is added when it comes."""
        return self.give_up()

    def give_up(self) -> tuple[Effect, ...]:
        """Nobody is waited for any more."""
        late = sorted(peer for peer in self._awaited if self._settled.get(peer, -1) < self._at.round)
        self._awaited.clear()
        return (
            *self._start.give_up(),
            *(Skip(peer, "it was late; its change is added when it comes") for peer in late),
        )

    def take(self, round_number: int) -> tuple[Input, ...]:
        """What is here, in the order of position and name; nothing stays."""
        if start := self._start.take(round_number):
            return start
        inputs = tuple(
            Input(peer, position, delta, Fraction(1), 0) for (position, peer), delta in sorted(self._ready.items())
        )
        self._ready = {}
        self._awaited = set()
        if self._since < round_number - 2 * MAX_RECENT:
            self._since = round_number - 2 * MAX_RECENT
            self._seen = {key for key in self._seen if key[0].round >= self._since}
        return inputs
