"""What the stages of routes have kept of prompts that we have asked, as far as we know.

Nobody tells us: we remember under which names we have asked them to keep rows, and forget a prompt when they have
not. The prompts themselves are not remembered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from protocols.pipe.messages import Hop, Prefix
from protocols.pipe.prefixes import PREFIX_STEP

MOST: Final = 64  # prompts that are remembered; more than fit into the memory of most stages

Place = tuple[str, str, tuple[Hop, ...]]  # manifest, adapter ("": none) and route


@dataclass(frozen=True, slots=True)
class Kept:
    """A route whose stages may hold the beginning of a prompt."""

    manifest: str
    adapter: str
    route: tuple[Hop, ...]
    tokens: int


class KeptPrompts:
    """The last ones, the oldest first."""

    def __init__(self) -> None:
        self._known: list[tuple[Place, Mapping[bytes, int]]] = []

    @property
    def lengths(self) -> Collection[int]:
        """Where they and those before them ended, unless every prompt has a border there."""
        return {tokens for _, names in self._known for tokens in names.values() if tokens % PREFIX_STEP}

    def remember(self, manifest: str, adapter: str, route: tuple[Hop, ...], prefixes: Sequence[Prefix]) -> None:
        """Stages were asked to keep the rows of a prompt. Its own beginnings need no place any more."""
        place = (manifest, adapter, route)
        names = {prefix.name: prefix.tokens for prefix in prefixes}
        if names:
            self._known = [one for one in self._known if one[0] != place or not one[1].keys() <= names.keys()]
            self._known = [*self._known[-(MOST - 1) :], (place, names)]

    def forget(self, manifest: str, adapter: str, route: tuple[Hop, ...], prefixes: Sequence[Prefix]) -> None:
        """The stages have not kept what begins like this."""
        place, names = (manifest, adapter, route), {prefix.name for prefix in prefixes}
        self._known = [one for one in self._known if one[0] != place or not one[1].keys() & names]

    def of(self, prefixes: Sequence[Prefix]) -> list[Kept]:
        """Who may hold a beginning of this prompt: each route with the longest one, the longest first."""
        found: dict[Place, int] = {}
        for place, names in self._known:
            for prefix in reversed(prefixes):
                if prefix.name in names:
                    found[place] = max(found.get(place, 0), prefix.tokens)
                    break
        return sorted((Kept(*place, tokens) for place, tokens in found.items()), key=lambda kept: -kept.tokens)
