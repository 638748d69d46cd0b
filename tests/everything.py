"""Rights of a network in which everybody may do everything."""

from __future__ import annotations

from meshnode.core.health import Health
from meshnode.membership.rights import Rights
from protocols.membership import ROLES

EVERYTHING = Rights(lambda peer: frozenset(ROLES), Health(lambda: 0.0))
