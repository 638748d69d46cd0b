"""Asking a node: one answer from its question to its receipt, and what people say about it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import structlog

from meshnode.api.messages import (
    Answer,
    Embedding,
    Judgement,
    Likelihood,
    Likely,
    Piece,
    Receipt,
    Replaced,
    Stage,
    StageTimes,
    ToolCall,
    read,
)
from meshnode.api.status import model_of
from meshnode.core.errors import BadRequest, Declined
from meshnode.core.tracing import Phases, read_traceparent, unsampled
from meshnode.node import Node
from meshnode.services.inference import receipt, text
from meshnode.services.inference.receipt import Waiting
from meshnode.services.inference.text import Called, Started, Text
from meshnode.text.question import MAX_SHOWN, Question
from protocols.enginewire.messages import BAD_ADAPTER
from protocols.errors import MeshError
from protocols.ids import short

SPOILT: Final = ("no-adapter", BAD_ADAPTER)  # codes of answers that failed for their adapter

Event = Waiting | Started | Piece | Answer


async def ask(node: Node, question: Question) -> AsyncGenerator[Event, None]:
    """What happens to one question, at last its answer. Use it in `contextlib.aclosing`.

    The answer is kept for `judge`, if the node keeps answers, and counts for the adapter that it came with.

    Raises what `TextService.answer` raises. If cancelled or closed: the generation ends on all stages.
    """
    tokens: list[int] = []
    texts: list[str] = []
    likely: list[Likelihood] = []
    calls: list[ToolCall] = []
    async with (
        _traced(node, question) as (phases, asked),
        _watched(node, question),
        aclosing(node.text.answer(asked)) as pieces,
    ):
        async for piece in pieces:
            match piece:
                case Text(words, token, chance, best):
                    phases.enter("decode")
                    texts.append(words)
                    if token >= 0:
                        tokens.append(token)
                    told = None if chance is None else _likelihood(chance, best)
                    if told is not None:
                        likely.append(told)
                    yield Piece(words, token, told)
                case Called(call):
                    calls.append(ToolCall(name=call.name, arguments=call.arguments))
                    yield Piece("", -1, call=calls[-1])
                case receipt.Receipt():
                    whole = "".join(texts)
                    kept = await node.samples.keep(question, whole)
                    node.rollout.answered(piece.adapter)
                    yield Answer(
                        text=whole,
                        reason=piece.reason,
                        stopped_by=piece.stopped_by,
                        id="" if kept is None else str(kept),
                        token_ids=tuple(tokens),
                        prompt_token_ids=piece.prompt,
                        tool_calls=tuple(calls),
                        logprobs=tuple(likely),
                        receipt=_receipt(piece),
                    )
                case _:
                    if isinstance(piece, Started):
                        phases.enter("prefill")
                    yield piece


async def embed(node: Node, given: Any, *, adapter: Any = None) -> Embedding:
    """A text, or token ids, as one vector. Raises what `TextService.embed` raises."""
    made = await node.text.embed(given, adapter=adapter)
    return Embedding(vector=made.values, prompt_token_ids=made.receipt.prompt, receipt=_receipt(made.receipt))


def judge(node: Node, answer: Any, correct: Any, label: Any) -> Judgement:
    """Note whether a kept answer was right, and what would have been. Raises BadRequest, DiskError."""
    if not isinstance(correct, bool) or not isinstance(label, str):
        raise BadRequest("feedback takes an answer, whether it was correct (true or false), and a label in text")
    judged = node.samples.judge(_answer_id(answer), correct, label)
    return Judgement(answer=str(judged.id), correct=correct, label=judged.label)


def name_peers(node: Node, sentence: str) -> str:
    """The sentence with the names of nodes beside their peer ids, which nobody can tell apart."""
    for peer, advert in node.directory.live().items():
        if advert.name:
            sentence = sentence.replace(peer, f"{advert.name} ({short(peer)})")
    return sentence


@asynccontextmanager
async def _traced(node: Node, question: Question) -> AsyncIterator[tuple[Phases, Question]]:
    """The span of a question, and the question as a child of it: so its stages know where theirs belong.

    Log lines that come of it have the id of its trace, here and on the stages, whether anybody keeps spans or not.
    """
    phases = Phases(node.parts.tracer, "question", read_traceparent(question.traceparent))
    place = phases.context or unsampled()
    structlog.contextvars.bind_contextvars(request=place.trace_id.hex())
    phases.enter("queue")
    failed = "cancelled"
    try:
        yield phases, replace(question, traceparent=place.traceparent)
        failed = ""
    except MeshError as error:
        failed = str(error)
        raise
    finally:
        phases.end(failed)
        structlog.contextvars.unbind_contextvars("request")


@asynccontextmanager
async def _watched(node: Node, question: Question) -> AsyncIterator[None]:
    """An answer that an adapter spoils is one of its failures."""
    used = node.rollout.using
    adapter = question.adapter if question.adapter is not None else used.adapter if used is not None else ""
    try:
        yield
    except Declined as error:
        if error.code in SPOILT:
            node.rollout.answered(adapter, wrong=True)
        raise


def _answer_id(given: Any) -> int:
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) <= 18:
        return int(given)
    raise BadRequest(f"answer is {repr(given)[:MAX_SHOWN]}; it takes the number that stands behind an answer")


def _likelihood(of: text.Likelihood, top: Sequence[text.Likelihood]) -> Likelihood:
    best = tuple(Likely(token=one.token, bytes=tuple(one.data), logprob=one.logprob) for one in top)
    return Likelihood(token=of.token, bytes=tuple(of.data), logprob=of.logprob, top=best)


def _receipt(figures: receipt.Receipt) -> Receipt:
    return Receipt(
        model=model_of(figures.release),
        route=tuple(Stage(peer=hop.peer, first=hop.first, last=hop.last) for hop in figures.route),
        adapter=figures.adapter,
        cached_tokens=figures.cached,
        ttft_ms=round(figures.first_token_ms, 2) if figures.arrivals else 0.0,
        decode_tok_s=round(figures.decode_tokens_s, 2) if len(figures.arrivals) > 1 else None,
        hops=tuple(read(StageTimes, hop) for hop in figures.hops()),
        return_ms=figures.return_ms(),
        replaced=tuple(_replaced(loss, figures.began) for loss in figures.replaced),
    )


def _replaced(loss: receipt.Replaced, began: float) -> Replaced:
    return Replaced(
        peer="" if loss.hop is None else loss.hop.peer,
        first=0 if loss.hop is None else loss.hop.first,
        last=0 if loss.hop is None else loss.hop.last,
        tokens=loss.tokens,
        at_ms=round((loss.lost_at - began) * 1000, 2),
        gap_ms=0.0 if loss.back_at is None else round((loss.back_at - loss.lost_at) * 1000, 2),
        reason=loss.reason,
    )
