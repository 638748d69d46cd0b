"""Names of the beginnings of prompts, by which stages find rows that they have kept. See SPEC.md."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Final

from protocols.codec import dumps
from protocols.pipe.messages import MAX_PREFIXES, PREFIX_BYTES, Open, Prefix

PREFIX_STEP: Final = 64  # tokens from one named beginning of a prompt to the next; below, nothing is kept

_TOKENS: Final = b"meshnode/prefix/1\0"
_STAGE: Final = "meshnode/kept rows/1"


def prefixes(prompt: Sequence[int], seen: Collection[int] = (), salt: bytes = b"") -> tuple[Prefix, ...]:
    """Beginnings of a prompt, each longer than the one before: at every `PREFIX_STEP` tokens, or a multiple of that
    for a long prompt, where an earlier prompt may have ended, and the whole.

    Args:
      seen: how long earlier prompts were.
      salt: prompts with another one have other names.
    """
    length = len(prompt)
    if length < PREFIX_STEP:
        return ()
    ends = {length, *sorted(n for n in seen if PREFIX_STEP <= n < length)[-(MAX_PREFIXES // 2 - 1) :]}
    step = PREFIX_STEP
    while length // step > MAX_PREFIXES // 2:
        step *= 2
    ends |= set(range(step, length, step))
    ids = array("i", prompt)
    if sys.byteorder == "big":
        ids.byteswap()
    data, done = memoryview(ids).cast("B"), 0
    running = sha256(_TOKENS + sha256(salt).digest())
    out = []
    for end in sorted(ends):
        running.update(data[4 * done : 4 * end])
        out.append(Prefix(tokens=end, name=running.digest()[:PREFIX_BYTES]))
        done = end
    return tuple(out)


def kept_as(opening: Open) -> tuple[Prefix, ...]:
    """The prefixes of a session under the names by which its stage keeps their rows.

    These tell everything that the rows depend on beside the tokens: the model, the adapter, and through which stages
    they came. And they tell who asks: nobody finds what was kept of another one's prompt.
    """
    route = [[hop.peer, hop.incarnation, hop.first, hop.last] for hop in opening.route[: opening.index + 1]]
    whole = dumps([_STAGE, opening.origin, opening.manifest, opening.variant, opening.adapter, route])
    return tuple(
        Prefix(tokens=prefix.tokens, name=sha256(whole + prefix.name).digest()[:PREFIX_BYTES])
        for prefix in opening.prefixes
    )
