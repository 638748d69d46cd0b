"""One exchange of signed records, without I/O. SPEC.md, section Behaviour.

Rule 1: every state and every transition is in TRANSITIONS, nowhere else.
Rule 2: no clock, no I/O: messages come in through `handle`, orders go out as effects, in their order.
The records are a snapshot of the moment the machine was made; nothing is learnt or forgotten meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, peer_id_of, public_key_of
from protocols.sync.messages import (
    MAX_ENTRIES,
    MAX_PAGE_ENTRIES,
    MAX_PAGE_RECORDS,
    MAX_RECORDS_BYTES,
    PAGE_BYTES,
    Digest,
    Held,
    Item,
    Message,
    Name,
    Records,
    Wanted,
)

T = TypeVar("T")

Key = tuple[str, PeerId]  # domain, signer
Version = tuple[int, int]  # incarnation, sequence


class State(Enum):
    START = "start"  # asker: nothing sent yet
    LEARNING = "learning"  # asker: digest sent; the answerer's records come
    ASKED = "asked"  # asker: the answerer says what it wants
    READING = "reading"  # answerer: the asker's digest comes
    TAKING = "taking"  # answerer: the asker's records come
    DONE = "done"
    FAILED = "failed"  # the peer broke a rule; nothing more is sent or read


@dataclass(frozen=True, slots=True)
class Send:
    message: Message


@dataclass(frozen=True, slots=True)
class Take:
    """A record came: check it like any other record."""

    record: bytes
    age_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Both sides have what the other had. sent, taken: numbers of records."""

    sent: int
    taken: int


Effect = Send | Take | Finished

# (state, message, whether another page follows) -> next state
TRANSITIONS: Final[dict[tuple[State, type[Message], bool], State]] = {
    (State.LEARNING, Records, True): State.LEARNING,
    (State.LEARNING, Records, False): State.ASKED,
    (State.ASKED, Wanted, True): State.ASKED,
    (State.ASKED, Wanted, False): State.DONE,
    (State.READING, Digest, True): State.READING,
    (State.READING, Digest, False): State.TAKING,
    (State.TAKING, Records, True): State.TAKING,
    (State.TAKING, Records, False): State.DONE,
}


class SyncMachine:
    """One side of one exchange."""

    def __init__(
        self,
        versions: Mapping[Key, Version],
        shareable: Mapping[Key, tuple[bytes, float]],
        *,
        asking: bool,
    ) -> None:
        """
        Args:
          versions: the newest version we know of every record, also of those that we do not give away.
          shareable: records that we give away, each with its age in seconds.
          asking: we opened the stream.
        """
        self._versions = dict(sorted(versions.items(), key=lambda item: _order(item[0]))[:MAX_ENTRIES])
        self._shareable = {key: value for key, value in shareable.items() if key in self._versions}
        self.state = State.START if asking else State.READING
        self._theirs: dict[Key, Version] = {}  # answerer: the asker's digest
        self._wanted: list[Key] = []  # asker: the answerer's wishes
        self._before: tuple[str, bytes] | None = None  # last name of the pages so far
        self._sent = 0
        self._taken = 0
        self._taken_bytes = 0

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    def begin(self) -> tuple[Effect, ...]:
        """Asker: the first messages. Raises LocalProtocolError when it is not the time for them."""
        if self.state is not State.START:
            raise LocalProtocolError(f"a sync can't begin in the state {self.state.value}")
        self.state = State.LEARNING
        held = [Held(name=_name(k), incarnation=v[0], sequence=v[1]) for k, v in self._versions.items()]
        return tuple(Send(Digest(held=page, more=more)) for page, more in _pages(held, MAX_PAGE_ENTRIES))

    def handle(self, message: Message) -> tuple[Effect, ...]:
        """A message of the peer.

        Raises RemoteProtocolError: out of turn, out of order, or more than the limits allow.
        """
        after = TRANSITIONS.get((self.state, type(message), message.more))
        try:
            if after is None:
                raise RemoteProtocolError(f"a {type(message).__name__} has no place in the state {self.state.value}")
            effects = self._receive(message)
        except RemoteProtocolError:
            self.state = State.FAILED
            raise
        self.state = after
        if not message.more:
            if isinstance(message, Digest):
                effects += self._answer()
            elif isinstance(message, Wanted):
                effects += self._give(self._wanted)
        return (*effects, Finished(self._sent, self._taken)) if self.done else tuple(effects)

    def _receive(self, message: Message) -> list[Effect]:
        if isinstance(message, Records):
            return self._take(message)
        if isinstance(message, Digest):
            self._check_page([held.name for held in message.held], message.more, len(self._theirs))
            for held in message.held:
                self._theirs[_key(held.name)] = (held.incarnation, held.sequence)
            return []
        self._check_page(list(message.names), message.more, len(self._wanted))
        for name in message.names:
            if _key(name) not in self._versions:
                raise RemoteProtocolError("the peer wants a record that was not in our digest")
            self._wanted.append(_key(name))
        return []

    def _take(self, page: Records) -> list[Effect]:
        self._taken += len(page.items)
        self._taken_bytes += sum(len(item.record) for item in page.items)
        if page.more and not page.items:
            raise RemoteProtocolError("an empty page of records that is not the last")
        if self._taken > MAX_ENTRIES or self._taken_bytes > MAX_RECORDS_BYTES:
            raise RemoteProtocolError(
                f"{self._taken} records of {self._taken_bytes} bytes; limits {MAX_ENTRIES} and {MAX_RECORDS_BYTES}"
            )
        return [Take(item.record, item.age_ms / 1000) for item in page.items]

    def _check_page(self, names: list[Name], more: bool, so_far: int) -> None:
        if more and not names:
            raise RemoteProtocolError("an empty page that is not the last")
        if so_far + len(names) > MAX_ENTRIES:
            raise RemoteProtocolError(f"more than {MAX_ENTRIES} records in one exchange")
        for name in names:
            order = (name.domain, name.signer)
            if self._before is not None and order <= self._before:
                raise RemoteProtocolError("the names of records are not sorted, or one comes twice")
            self._before = order

    def _answer(self) -> list[Effect]:
        """Answerer: what the asker lacks, then what we want of it."""
        lacking = [key for key in self._shareable if self._versions[key] > self._theirs.get(key, (-1, -1))]
        wanted = [_name(key) for key, version in self._theirs.items() if version > self._versions.get(key, (-1, -1))]
        names = (Send(Wanted(names=page, more=more)) for page, more in _pages(wanted, MAX_PAGE_ENTRIES))
        return [*self._give(sorted(lacking, key=_order)), *names]

    def _give(self, keys: list[Key]) -> list[Effect]:
        """Pages of records. What we do not give away (it has expired) is left out, and so is what the peer's
        limits would refuse: it goes with the next exchange."""
        pages: list[list[Item]] = [[]]
        page_bytes = total_bytes = 0
        for record, age_s in (self._shareable[key] for key in keys if key in self._shareable):
            total_bytes += len(record)
            if total_bytes > MAX_RECORDS_BYTES:
                break
            if pages[-1] and (page_bytes + len(record) > PAGE_BYTES or len(pages[-1]) == MAX_PAGE_RECORDS):
                pages.append([])
                page_bytes = 0
            pages[-1].append(Item(record=record, age_ms=round(age_s * 1000)))
            page_bytes += len(record)
            self._sent += 1
        return [Send(Records(items=tuple(page), more=page is not pages[-1])) for page in pages]


def _name(key: Key) -> Name:
    return Name(domain=key[0], signer=public_key_of(key[1]))


def _key(name: Name) -> Key:
    return name.domain, peer_id_of(name.signer)


def _order(key: Key) -> tuple[str, bytes]:
    return key[0], public_key_of(key[1])


def _pages(items: list[T], size: int) -> Iterator[tuple[tuple[T, ...], bool]]:
    """Slices of at most `size` items, each with whether another follows; one empty slice for no items."""
    for start in range(0, max(1, len(items)), size):
        yield tuple(items[start : start + size]), start + size < len(items)
