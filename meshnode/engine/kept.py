"""Rows of prompts that outlive their sessions, for sessions that begin alike: the prefix cache of one engine.

They are found by the names of the beginnings that they hold (`protocols/pipe/prefixes.py`), and go oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from meshnode.engine.backend import Rows
from protocols.pipe.messages import Prefix

MAX_KEPT: Final = 256  # prompts; looking for one must stay short against a step

Scope = tuple[int, int, str]  # layers [first, last) and the adapter, without which no row is the same


@dataclass(eq=False, slots=True)
class KeptPrompt:
    """The rows of one prompt."""

    scope: Scope
    rows: Rows
    nbytes: int  # of keys and values
    prefixes: dict[bytes, int]  # the name of each beginning that it holds, and its tokens


class KeptPrompts:
    """All of an engine, the one that was used longest ago first."""

    def __init__(self) -> None:
        self._prompts: list[KeptPrompt] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, prompt: KeptPrompt) -> bool:
        return prompt in self._prompts

    @property
    def nbytes(self) -> int:
        return sum(prompt.nbytes for prompt in self._prompts)

    def find(self, scope: Scope, prefixes: Sequence[Prefix]) -> tuple[KeptPrompt, int] | None:
        """What holds the longest of these beginnings, and its tokens. It counts as used."""
        for prefix in reversed(prefixes):
            for prompt in self._prompts:
                if prompt.scope == scope and prompt.prefixes.get(prefix.name) == prefix.tokens:
                    self._prompts.remove(prompt)
                    self._prompts.append(prompt)
                    return prompt, prefix.tokens
        return None

    def has(self, scope: Scope, prefix: Prefix) -> bool:
        """Whether it is held already. If so, it counts as used."""
        return self.find(scope, (prefix,)) is not None

    def add(self, added: KeptPrompt) -> None:
        """Keep one more. Those that are beginnings of it go, for it holds their rows, too."""
        self._prompts = [
            prompt
            for prompt in self._prompts
            if prompt.scope != added.scope or not prompt.prefixes.keys() <= added.prefixes.keys()
        ][-(MAX_KEPT - 1) :]
        self._prompts.append(added)

    def shrink(self, most: int, *, spare: KeptPrompt | None = None) -> None:
        """Let go of the oldest until they take no more than `most` bytes; `spare` goes in no case."""
        for prompt in list(self._prompts):
            if self.nbytes <= most:
                return
            if prompt is not spare:
                self._prompts.remove(prompt)

    def remove(self, prompt: KeptPrompt) -> None:
        """Its rows are used up."""
        self._prompts.remove(prompt)
