"""Messages of /meshnode/sync/1: two nodes give each other the signed records that the other lacks. See SPEC.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import Union, at, message
from protocols.envelope import MAX_RECORD_BYTES

PROTOCOL: Final = "/meshnode/sync/1"

MAX_PAGE_ENTRIES: Final = 512  # about 30 KiB
MAX_ENTRIES: Final = 4096  # of one side in one exchange
MAX_PAGE_RECORDS: Final = 256
PAGE_BYTES: Final = 128 * 1024  # a page of records is closed when it has reached this
MAX_RECORDS_BYTES: Final = 16 << 20  # all records of one side in one exchange
MAX_MESSAGE_BYTES: Final = 256 * 1024
TIMEOUT_S: Final = 10.0  # for the whole exchange; the stream is reset then


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """Whose record of which kind."""

    domain: str = at(1, limit=64)
    signer: bytes = at(2, size=32)  # Ed25519 public key


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The newest version of a record that the sender knows."""

    name: Name = at(1)
    incarnation: int = at(2)
    sequence: int = at(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A signed record and how long ago the sender saw its version first."""

    record: bytes = at(1, limit=MAX_RECORD_BYTES)
    age_ms: int = at(2, default=0)


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Asker -> answerer, first: what I know. Sorted by domain and signer, over all pages."""

    held: tuple[Held, ...] = at(1, limit=MAX_PAGE_ENTRIES)
    more: bool = at(2, default=False)  # another page follows


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Answerer -> asker, last: what you have newer than I. Sorted by domain and signer, over all pages."""

    names: tuple[Name, ...] = at(1, limit=MAX_PAGE_ENTRIES)
    more: bool = at(2, default=False)


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Both ways: what you lack. The answerer's come before its `Wanted`, the asker's after it."""

    items: tuple[Item, ...] = at(1, limit=MAX_PAGE_RECORDS)
    more: bool = at(2, default=False)


Message = Digest | Wanted | Records
SYNC: Final[Union[Message]] = Union(PROTOCOL, Digest, Wanted, Records, limit=MAX_MESSAGE_BYTES)
