"""Asking a model of a member's own server, in the words of `asking.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Piece, Receipt, ServedModel
from meshnode.core.errors import BadRequest
from meshnode.node import Node
from meshnode.services.inference.text import Started
from meshnode.text.question import Question
from meshnode.text.tools import AUTO
from protocols.upstream.messages import End

VARIANT: Final = "upstream"  # of a model that the mesh does not compute
UNTOLD: Final = -1  # in the place of a token's number, which such servers don't tell


async def ask_upstream(node: Node, model: str, question: Question) -> AsyncGenerator[Event, None]:
    """As `asking.ask`. Nothing is kept for `judge`: the mesh can't learn from what it did not compute.

    Raises BadRequest, and what `UpstreamService.ask` raises.
    """
    texts: list[str] = []
    peer = ""
    async with aclosing(node.upstream.ask(model, body_of(question))) as events:
        async for event in events:
            if isinstance(event, End):
                yield Answer(
                    text="".join(texts),
                    reason="eos" if event.reason == "stop" else event.reason,
                    token_ids=(UNTOLD,) * min(event.tokens, 1 << 20),
                    prompt_token_ids=(UNTOLD,) * min(event.prompt_tokens, 1 << 20),
                    receipt=Receipt(model=ServedModel(name=model, variant=VARIANT), upstream=peer),
                )
            elif not peer:
                peer = event
                yield Started(0)
            else:
                texts.append(event)
                yield Piece(event, UNTOLD)


def body_of(question: Question) -> dict[str, Any]:
    """A question as OpenAI's dialect has it. Raises BadRequest for what is not passed on."""
    for what, wanted in (
        ("token ids", question.token_ids is not None),
        ("tools", bool(question.tools) or question.tool_choice != AUTO),
        ("a form of the answer", question.form is not None),
        ("logprobs", question.logprobs is not None),
        ("top_k", bool(question.top_k)),
        ("min_p", bool(question.min_p)),
        ("repetition_penalty", question.repetition_penalty != 1.0),
    ):
        if wanted:
            raise BadRequest(
                f"{what} can't be passed on to a server of a member; ask a model that the mesh computes (auto)"
            )
    body: dict[str, Any] = {
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        "top_p": question.top_p,
        "presence_penalty": question.presence_penalty or None,
        "frequency_penalty": question.frequency_penalty or None,
        "seed": question.seed,
        "stop": list(question.stop) or None,
    }
    if question.prompt is not None:
        body["prompt"] = question.prompt
    else:
        body["messages"] = question.as_json()["messages"]
    return {name: value for name, value in body.items() if value is not None}
