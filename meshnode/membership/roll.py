"""The roll of members: everybody whose certificate this node has seen, with what it gives now."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from meshnode.core.errors import ConfigError
from meshnode.membership.port import Membership
from meshnode.membership.withdrawals import restore_withdrawals
from meshnode.state.port import Records
from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership import Standing, Untrusted
from protocols.membership.messages import MEMBER, Chain, printable

_SEEN: Final = "seen"  # kind of record
MIN_PART: Final = 4  # characters of a peer id that may stand for it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    name: str = at(1, limit=64)
    seen_ms: int = at(2)  # UTC milliseconds; 0: never met


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One member, or one that was. Times are UTC milliseconds."""

    peer: PeerId
    name: str  # as it called itself when it was met; may be empty
    standing: Standing | None  # None: its certificate does not hold
    why_not: str  # then: why, in a sentence
    was_put_out: bool  # it has no membership, for its own was withdrawn
    invited_by: PeerId | None  # None: a founder's key itself
    seen_ms: int  # when it was connected last; 0: never

    @property
    def called(self) -> str:
        """For people."""
        return f"{self.name} ({short(self.peer)})" if self.name else short(self.peer)


def note_seen(records: Records, peer: PeerId, name: str, seen_ms: int) -> None:
    """A member is connected at `seen_ms`, under this name; 0: it was let in, and has not come yet."""
    records.put_record(_SEEN, peer, encode(_Seen(name=printable(name)[:64], seen_ms=seen_ms)))


def roll(membership: Membership, records: Records, us: PeerId, wall_ms: int) -> tuple[Entry, ...]:
    """Everybody whose certificate is known, ourselves first, then by name."""
    trust = membership.trust()
    restore_withdrawals(trust, records, wall_ms)
    chains: dict[PeerId, tuple[bytes, ...]] = {}
    for peer, data in records.records(MEMBER).items():
        with suppress(RemoteProtocolError):
            chains[PeerId(peer)] = decode(Chain, data).certificates
    chains[us] = membership.chain
    seen: dict[str, _Seen] = {}
    for peer, data in records.records(_SEEN).items():
        with suppress(RemoteProtocolError):
            seen[peer] = decode(_Seen, data)
    out, ousted = [], trust.ousted()
    for peer, chain in chains.items():
        standing, why_not = None, ""
        try:
            standing = trust.check(chain, wall_ms)
        except Untrusted as error:
            why_not = str(error)
        known = seen.get(peer, _Seen(name="", seen_ms=0))
        name = known.name or (membership.name if peer == us else "")
        entry = Entry(
            peer=peer,
            name=name,
            standing=standing,
            why_not=why_not,
            was_put_out=standing is None and peer in ousted,
            invited_by=trust.inviter_of(chain),
            seen_ms=wall_ms if peer == us else known.seen_ms,
        )
        out.append(entry)
    return tuple(sorted(out, key=lambda entry: (entry.peer != us, entry.standing is None, entry.name, entry.peer)))


def find_member(entries: tuple[Entry, ...], wanted: str) -> Entry:
    """The member that a person means: by its name, its peer id, or the beginning or end of that.

    Raises ConfigError when nobody or more than one is meant.
    """
    exact = [entry for entry in entries if wanted in (entry.peer, entry.name, short(entry.peer))]
    found = exact or [
        entry for entry in entries if len(wanted) >= MIN_PART and entry.peer.endswith(wanted.removeprefix("12D3…"))
    ]
    if not found and len(wanted) >= 2 * MIN_PART:
        found = [entry for entry in entries if entry.peer.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"There is no member {wanted!r} in this network; `meshnode members` lists them all.")
    called = ", ".join(entry.peer for entry in found)
    raise ConfigError(f"{wanted!r} is the name of {len(found)} members; name one by its peer id: {called}")
