"""What each peer may do here, by the roles of its certificate; and who tried to do more."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from meshnode.core.errors import Declined
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.membership.place import REJOIN
from protocols.ids import PeerId, short
from protocols.membership.messages import ASK, FORBIDDEN, SERVE

MAX_NAMED: Final = 8  # members that are shown at the same time for what they may not do

_log = get_logger("membership")


def demand(roles: Collection[str], role: str, deed: str) -> None:
    """For what this node wants to do itself, with these roles: `deed` is what it may not do ("ask questions").

    Raises Declined `forbidden`, with what to do.
    """
    if role in roles:
        return
    if not roles:
        raise Declined(
            FORBIDDEN,
            f"This node may not {deed}: it is no member of the network any more, and `meshnode doctor` says why. "
            f"{REJOIN}",
        )
    wanted = ",".join(dict.fromkeys((ASK if role == ASK else SERVE, role)))
    raise Declined(
        FORBIDDEN,
        f"This node may not {deed}: its certificate lacks the role {role}. Let it join again with a ticket that "
        f"gives it (`meshnode invite --roles {wanted}` on a device that may, `meshnode join TICKET --anew` here).",
    )


class Rights:
    """Asked wherever a role is needed. Members that lack it are named to people, a few at a time."""

    def __init__(self, roles_of: Callable[[PeerId], frozenset[str]], health: Health) -> None:
        self._roles_of = roles_of
        self._health = health
        self._named: dict[PeerId, str] = {}  # in the order in which they were noticed -> the role they lack

    def has(self, peer: PeerId, role: str) -> bool:
        """Whether a peer has a role, at this moment."""
        return role in self._roles_of(peer)

    def demand(self, us: PeerId, role: str, deed: str) -> None:
        """For what this node wants to do itself. Raises Declined `forbidden`, with what to do."""
        demand(self._roles_of(us), role, deed)

    def may(self, peer: PeerId, role: str, deed: str) -> bool:
        """The same for something that the peer does: `deed` ("serves layers") is shown if it may not."""
        roles = self._roles_of(peer)
        if role in roles:
            if self._named.get(peer) == role:
                del self._named[peer]
                self._health.clear("role-missing", peer=short(peer))
        elif roles:  # strangers are many, and refused at the door
            self._name(peer, role, deed)
        return role in roles

    def _name(self, peer: PeerId, role: str, deed: str) -> None:
        if self._named.pop(peer, None) != role:
            _log.warning("role.missing", peer=peer, role=role, deed=deed)
        self._named[peer] = role
        if len(self._named) > MAX_NAMED:
            first = next(iter(self._named))
            del self._named[first]
            self._health.clear("role-missing", peer=short(first))
        self._health.set("role-missing", peer=short(peer), deed=deed, role=role)
