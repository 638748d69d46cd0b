"""Who is let in now: peers that have proved their membership, and those that have accepted ours as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from meshnode.core.clock import Wall
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.membership.registry import Registry
from meshnode.net.port import Host
from protocols.ids import PeerId, short
from protocols.membership import Member, Untrusted
from protocols.membership.trust import ordered_roles

CLOCK_WARNING_MS: Final = 2_000  # intents are ranked by UTC milliseconds; more than this is worth a word

_log = get_logger("membership")


class Admissions:
    """Admits at the host whoever proved its membership, and takes that back."""

    def __init__(self, host: Host, registry: Registry, health: Health, wall: Wall) -> None:
        self._host = host
        self._registry = registry
        self._health = health
        self._wall = wall
        self._members: dict[PeerId, Member] = {}  # connected and mutually admitted
        self._proven: dict[PeerId, Member] = {}  # admitted at the host
        self.changes = Changes()  # of `members`, and of what the registry knows

    @property
    def members(self) -> Mapping[PeerId, Member]:
        """Peers that are connected and have accepted us, as we have accepted them."""
        return self._members

    def has_proved(self, peer: PeerId) -> bool:
        """Whether a peer has proved its membership, whatever it thinks of ours."""
        return peer in self._proven

    def admit(self, member: Member, offset_ms: int) -> None:
        """It proved its membership; whether it takes ours for proven we do not know yet.

        offset_ms: its clock minus ours, milliseconds.
        """
        self._proven[member.peer] = member
        if self._registry.keep(member.peer, member.chain, proven=True):
            self.changes.notify()
        self._host.admit(member.peer, True)
        if abs(offset_ms) > CLOCK_WARNING_MS:
            self._health.set("clock-off", peer=short(member.peer), seconds=round(abs(offset_ms) / 1000))
        else:
            self._health.clear("clock-off", peer=short(member.peer))

    def complete(self, peer: PeerId) -> bool:
        """Both sides have admitted each other; whether that is new."""
        member = self._proven[peer]
        if self._members.get(peer) == member:
            return False
        self._members[peer] = member
        self._registry.note_seen(peer, member.name, self._wall())
        _log.info("member.admitted", peer=peer, name=member.name, roles=ordered_roles(member.standing.roles))
        self.changes.notify()
        return True

    def left(self, peer: PeerId, reason: str) -> None:
        """The connection has ended. The host keeps the admission: the id is proven anew by every connection."""
        if (member := self._members.pop(peer, None)) is not None:
            self._registry.note_seen(peer, member.name, self._wall())
            _log.info("member.left", peer=peer, reason=reason)
            self.changes.notify()

    def drop(self, peer: PeerId) -> None:
        """It is let in no more."""
        if self._members.pop(peer, None) is not None:
            self.changes.notify()
        if self._proven.pop(peer, None) is not None:
            self._host.admit(peer, False)

    def fallen(self) -> dict[PeerId, Untrusted]:
        """Those whose certificates do not hold any more, and why: they expire, and memberships are withdrawn.

        The others get the roles that they have by now.
        """
        now = self._wall()
        out: dict[PeerId, Untrusted] = {}
        for peer, member in list(self._proven.items()):
            try:
                standing = self._registry.trust.check(member.chain, now)
            except Untrusted as no:
                out[peer] = no
                continue
            if standing.roles != member.standing.roles:
                _log.info("member.changed", peer=peer, roles=ordered_roles(standing.roles))
                self._proven[peer] = replace(member, standing=standing)
                if peer in self._members:
                    self._members[peer] = self._proven[peer]
                    self.changes.notify()
        return out
