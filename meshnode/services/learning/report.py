"""What a node says about its learning."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

SHOWN_LOSSES: Final = 512  # of the curve; all of them are in the file
SHOWN_REFUSALS: Final = 16


@dataclass(slots=True)
class Report:
    """Of the lesson that is followed. Filled in by whoever does the work, read by `status`."""

    state: str = "off"  # off, waiting, preparing, or as the round machine names it; done
    why: str = ""  # a sentence: what it waits for, or what went wrong
    lesson: str = ""  # CID
    frame: str = ""  # CID
    model: str = ""  # CID of the manifest that is adapted
    mode: str = ""
    round: int = 0
    rounds: int = 0
    steps: int = 0  # done in this lesson
    samples: int = 0  # of our own, in the last round
    participants: tuple[str, ...] = ()
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=SHOWN_LOSSES))  # of each step, oldest first
    train_s: float = 0.0
    sent_bytes: int = 0  # of deltas, as published: each partner fetches them
    fetched_bytes: int = 0
    published: int = 0  # deltas
    mixed: int = 0  # deltas of others
    skipped: Counter[str] = field(default_factory=Counter)  # partners passed over, by reason
    refused: Counter[str] = field(default_factory=Counter)  # deltas not used, by reason
    refusals: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN_REFUSALS))  # sentences, newest last
    paused: bool = False  # for the sake of questions
    adapter: str = ""  # CID of the adapter that this node has made of the lesson

    def refuse(self, reason: str, sentence: str) -> None:
        """A delta is not used."""
        self.refused[reason] += 1
        self.refusals.append(sentence)
