"""Words for people that several protocols and services use."""

from __future__ import annotations

import re
from typing import Final

from protocols.ids import short

_PEER: Final = re.compile(r"(?<!/p2p/)\b12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\b")


def layers(first: int, last: int) -> str:
    """The layers [first, last), of which people are told the last one itself: "layer 16", "layers 0 to 15"."""
    return f"layer {first}" if last - first == 1 else f"layers {first} to {last - 1}"


def shortened(text: str) -> str:
    """The same with the short form of every peer id, but where one stands in an address, which is to be copied."""
    return _PEER.sub(lambda found: short(found[0]), text)
