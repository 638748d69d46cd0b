"""Answers as long as there is room for: clients ask for the longest that they could take, 32,000 tokens and more."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from meshnode.api.asking import Event
from meshnode.core.clock import Monotonic
from meshnode.core.errors import Declined
from meshnode.services.inference.text import Started
from meshnode.text.question import Question

FEWEST: Final = 16  # tokens; who has no room for so many has none
BELIEVED_S: Final = 300.0  # so long a length that was found is the longest that is tried: every try costs seconds


class Shorter:
    """Asks with half the length whenever a stage has no room for it; such an answer ends with "length".

    Stages keep memory for the whole length from the start, and say no when it is more than they have. That a prompt
    is too long for the model is said by our own node, and nothing helps.
    """

    def __init__(self, clock: Monotonic) -> None:
        self._clock = clock
        self._found = 0
        self._believed_until = 0.0

    async def ask(
        self, ask: Callable[[Question], AsyncGenerator[Event, None]], question: Question, context: int
    ) -> AsyncGenerator[Event, None]:
        """As `asking.ask`. `context`: tokens that the model holds."""
        most = min(question.max_tokens, context)
        if self._clock() < self._believed_until:
            most = min(most, self._found)
        question = replace(question, max_tokens=most)
        begun = False
        while True:
            try:
                async with aclosing(ask(question)) as events:
                    async for event in events:
                        if isinstance(event, Started) and not begun:
                            begun = True
                            if question.max_tokens < most:
                                self._found = question.max_tokens
                                self._believed_until = self._clock() + BELIEVED_S
                        yield event
                return
            except Declined as error:
                if begun or error.code != "too-long" or error.peer is None or question.max_tokens <= FEWEST:
                    raise
                question = replace(question, max_tokens=question.max_tokens // 2)
