"""Questions in words: text or chat turns in, text out, through the generations of the origin."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import trio

from meshnode.core.errors import BadRequest, Declined, TokenizerLost
from meshnode.core.log import get_logger
from meshnode.core.tracing import read_traceparent
from meshnode.services.inference.origin import SUPERSEDED
from meshnode.services.inference.queue import Place, QuestionQueue
from meshnode.services.inference.readiness import ReadinessService
from meshnode.services.inference.receipt import RELEASED, Generator, Piece, Receipt, Request, Taken, Vector, Waiting
from meshnode.services.inference.tokenizers import TokenizerShelf
from meshnode.services.port import Content, Releases
from meshnode.text.decoding import TextStream
from meshnode.text.port import OpenTokenizer, Tokenizer
from meshnode.text.question import NO_ADAPTER, Question, read_question
from meshnode.text.stops import StopStrings
from meshnode.text.tool_calls import ToolCall, ToolCalls
from meshnode.text.tools import AUTO, NONE, Tool, form_of, names_of
from protocols.errors import MeshError
from protocols.pipe.messages import MAX_GRAMMAR_BYTES, Chance, Grammar, Sampling, Trace

_log = get_logger("text")

P = TypeVar("P")

TOOL_CALLS: Final = "tool_calls"  # why an answer ended that calls tools
LONG_PROMPT: Final = 256  # tokens; reading them takes seconds on small devices, and whoever waits is told
PATIENCE_S: Final = 10.0  # a mesh that is just starting gets this long before a question is refused
GOODBYE_S: Final = 3.0  # for the end of the tokenizer's process


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model alone held a token, before penalties, temperature and cuts."""

    token: int
    data: bytes  # the text of the token by itself: a part of a character, maybe
    logprob: float  # natural logarithm of its probability


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer: the token, and the text that it completes (maybe none)."""

    text: str
    token: int  # -1: only text
    likelihood: Likelihood | None = None  # of the token, if the question asks for it
    likeliest: tuple[Likelihood, ...] = ()  # the most likely tokens in its place


@dataclass(frozen=True, slots=True)
class Called:
    """A part of the answer that calls a tool."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text as one vector of length 1: the mean of its tokens' hidden states after the final norm."""

    values: tuple[float, ...]
    receipt: Receipt  # its prompt are the tokens


@dataclass(frozen=True, slots=True)
class Started:
    """Every stage has taken the question, which has so many tokens: the answer follows."""

    prompt_tokens: int
    cached_tokens: int = 0  # of them, those that were computed for an earlier question


class _Said:
    """The text of an answer on its way to the reader: ended by stop strings, with calls taken out."""

    def __init__(self, question: Question, style: str) -> None:
        """`style`: in which the model calls tools."""
        offered = _offered(question)
        self._stops = StopStrings(question.stop)
        forced = question.tool_choice not in (AUTO, NONE)
        self._calls = ToolCalls(style, names_of(offered), forced=forced) if offered else None

    def feed(self, text: str) -> tuple[str, bool, list[ToolCall]]:
        """Text that may be shown, whether a stop string was met, and calls."""
        shown, met = self._stops.feed(text)
        if self._calls is None:
            return shown, met, []
        shown, calls = self._calls.feed(shown)
        return (shown, False, calls) if not met else self._ended(shown, calls, met=True)

    def end(self, text: str) -> tuple[str, bool, list[ToolCall]]:
        """The same at the end of the answer."""
        shown, met = self._stops.feed(text)
        if not met:
            shown += self._stops.rest()
        if self._calls is None:
            return shown, met, []
        shown, calls = self._calls.feed(shown)
        return self._ended(shown, calls, met=met)

    def _ended(self, shown: str, calls: list[ToolCall], *, met: bool) -> tuple[str, bool, list[ToolCall]]:
        assert self._calls is not None
        rest, more = self._calls.rest()
        return shown + rest, met, calls + more

    @property
    def stopped_by(self) -> str:
        """The stop string that was met; empty when none was."""
        return self._stops.met

    def reason(self, reason: str, *, met: bool) -> str:
        """Why the answer ended, where the generation ended for `reason`."""
        if self._calls is not None and self._calls.found and reason == "eos":
            return TOOL_CALLS
        return "stop" if met else reason


Event = Waiting | Started | Text | Called | Receipt  # of an answer


class TextService:
    """Holds the tokenizer of the served model, opened when the first question comes."""

    name = "text"

    def __init__(
        self,
        releases: Releases,
        content: Content,
        origin: Generator,
        readiness: ReadinessService,
        rng: random.Random,
        open_tokenizer: OpenTokenizer,
    ) -> None:
        self._releases = releases
        self._origin = origin
        self._readiness = readiness
        self._rng = rng
        self._shelf = TokenizerShelf(content, open_tokenizer, grammars=False)
        self._queue = QuestionQueue()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ends the tokenizer's process with the node."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await self._shelf.let_go()

    async def tokenizer(self) -> Tokenizer:
        """Of the model that is served now.

        Raises Declined `no-model`, `no-tokenizer`, ContentUnavailable, ModelError, TokenizerLost.
        """
        release = self._releases.current
        if release is None:
            raise Declined("no-model", self._releases.why_none)
        return await self._shelf.of(release)

    async def shown(self, question: Question) -> str:
        """What the model is given of a question, as text, up to where its answer begins.

        Raises what `tokenizer` raises; Declined for a question in token ids, and by the chat template.
        """
        if question.prompt is not None:
            return question.prompt
        if question.messages is None:
            raise Declined("no-text", "the question was asked in token ids")
        return await (await self.tokenizer()).render(question.messages, _offered(question))

    async def count(self, question: Question) -> int:
        """Tokens of a question as the model is given it. Raises what `tokenizer` raises; Declined by the template."""
        prompt, _ = await self._prompt(question)
        return len(prompt)

    async def _open_early(self) -> None:
        """While there is time; whatever is wrong is said when it is wanted."""
        with suppress(MeshError):
            await self.tokenizer()

    async def _prompt(self, question: Question) -> tuple[tuple[int, ...], TextStream]:
        """The tokens of a question, and what turns those of its answer into text.

        A process that ends under our hands is started anew, once.
        """
        try:
            return await _prepared(await self.tokenizer(), question)
        except TokenizerLost as error:
            _log.warning("tokenizer.lost", reason=str(error))
            return await _prepared(await self.tokenizer(), question)

    def _sampling(self, question: Question) -> Sampling:
        """As the stages take it: whole numbers, so that every node computes the same bytes."""
        return Sampling(
            seed=self._rng.getrandbits(62) if question.seed is None else question.seed,
            temperature_milli=round(question.temperature * 1000),
            top_k=question.top_k,
            top_p_micro=max(1, round(question.top_p * 1_000_000)),
            min_p_micro=round(question.min_p * 1_000_000),
            repetition_milli=round(question.repetition_penalty * 1000),
            presence_milli=round(question.presence_penalty * 1000),
            frequency_milli=round(question.frequency_penalty * 1000),
            chances=0 if question.logprobs is None else 1 + question.logprobs,
        )

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """The answer piece by piece, at last its receipt. Use it in `contextlib.aclosing`.

        A chain that does not answer yet is waited for a while first.

        Raises what `Generator.check_may_ask` raises, before it waits; what `Generator.generate` and `tokenizer`
        raise, and Declined by the chat template.

        If cancelled or closed: the generation ends.
        """
        async with aclosing(self._patiently(lambda place: self._ask(question, place))) as pieces:
            async for piece in pieces:
                yield piece

    async def embed(self, text: str | Sequence[int], *, adapter: str | None = None) -> Embedding:
        """A text, or token ids, as one vector. `adapter`: as in `Question`.

        Raises what `answer` raises; BadRequest; Declined `no-pooling`. If cancelled: the work ends on all stages.
        """
        question = read_question({"prompt" if isinstance(text, str) else "token_ids": text, "adapter": adapter})
        found: list[Vector | Receipt] = []
        async with aclosing(self._patiently(lambda place: self._pooled(question, place))) as pieces:
            found += [piece async for piece in pieces if not isinstance(piece, Waiting)]
        vector, receipt = found
        assert isinstance(vector, Vector) and isinstance(receipt, Receipt)  # `Generator` says so
        return Embedding(vector.values, receipt)

    async def _patiently(self, ask: Callable[[Place], AsyncGenerator[P, None]]) -> AsyncGenerator[Waiting | P, None]:
        """What `ask` gives, once the chain answers and there is room; it is asked again where waiting helps."""
        self._origin.check_may_ask()
        if not self._readiness.now.ready:
            yield Waiting(self._readiness.now.sentence)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._open_early)
                with trio.move_on_after(PATIENCE_S):  # whatever is wrong then is said by the attempt itself
                    await self._readiness.wait_ready()
        with self._queue.join() as place:
            told = ""
            while True:
                async with aclosing(place.turn()) as turns:
                    async for waiting in turns:
                        yield waiting
                try:
                    async with aclosing(ask(place)) as pieces:
                        async for piece in pieces:
                            yield piece
                    return
                except Declined as error:
                    if error.code != SUPERSEDED:
                        if not place.may_wait(error):
                            raise
                        if told != str(error):
                            told = str(error)
                            yield Waiting(told)
                        await place.pause(error)

    async def _request(self, question: Question) -> tuple[Request, TextStream, str]:
        """For the model that is served now, what turns its tokens into text, and the style of its calls.

        Raises Declined `superseded` when another one is served by then.
        """
        release = self._releases.current
        prompt, words = await self._prompt(question)
        style = (await self.tokenizer()).style
        if self._releases.current != release:
            raise Declined(SUPERSEDED, "another model is served by now")
        space = () if release is None else release.token_space
        request = Request(
            prompt,
            question.max_tokens,
            self._sampling(question),
            adapter=_adapter(question),
            asker=question.asker,
            trace=_trace(question),
            token_space=space,
            grammar=_grammar(form_of(style, question.tools, question.tool_choice) or question.form),
        )
        return request, words, style

    async def _pooled(self, question: Question, place: Place) -> AsyncGenerator[Vector | Receipt, None]:
        request, _, _ = await self._request(question)
        async with aclosing(self._origin.generate(replace(request, pooled=True))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Taken):
                    place.leave()
                elif isinstance(piece, Vector | Receipt):
                    yield piece

    async def _ask(self, question: Question, place: Place) -> AsyncGenerator[Event, None]:
        """The answer of the model that is served now. Raises Declined `superseded` when another one is by then."""
        request, words, style = await self._request(question)
        prompt = request.prompt
        said = _Said(question, style)
        async with aclosing(self._origin.generate(request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Taken):
                    place.leave()
                    yield Started(len(prompt), piece.cached)
                    if (unread := len(prompt) - piece.cached) >= LONG_PROMPT:
                        yield Waiting(f"it reads the prompt first, {unread} tokens")
                    continue
                if isinstance(piece, Waiting):
                    yield piece
                    continue
                if isinstance(piece, Receipt):
                    shown, met, calls = said.end(words.cut() if piece.reason == "length" else words.rest())
                    if shown:
                        yield Text(shown, -1)
                    for call in calls:
                        yield Called(call)
                    piece.reason = said.reason(piece.reason, met=met)
                    if met:
                        piece.stopped_by = said.stopped_by
                    yield piece
                    return
                assert isinstance(piece, Piece)  # a vector comes only to who asks for it
                shown, met, calls = said.feed(words.feed(piece.token))
                told = tuple(_likelihood(chance, words) for chance in piece.chances)
                yield Text(shown, piece.token, told[0] if told else None, told[1:])
                for call in calls:
                    yield Called(call)
                if met:
                    piece.receipt.reason, piece.receipt.stopped_by = said.reason("stop", met=True), said.stopped_by
                    yield piece.receipt
                    return


async def _prepared(tokenizer: Tokenizer, question: Question) -> tuple[tuple[int, ...], TextStream]:
    if question.token_ids is not None:
        return question.token_ids, tokenizer.stream(question.token_ids)
    if question.prompt is not None:
        prompt = await tokenizer.encode(question.prompt)
        return prompt, tokenizer.stream(prompt)
    # an answer in a conversation stands for itself: it begins with no blank
    return await tokenizer.chat(question.messages or (), _offered(question)), tokenizer.stream()


def _likelihood(chance: Chance, words: TextStream) -> Likelihood:
    return Likelihood(chance.token, words.alone(chance.token), -chance.nano_nats / 1e9)


def _grammar(form: tuple[str, str] | None) -> Grammar | None:
    """As the pipe has it. Raises BadRequest."""
    if form is None:
        return None
    kind, text = form
    if len(data := text.encode()) > MAX_GRAMMAR_BYTES:  # of a call: what was asked for itself is shorter
        raise BadRequest(
            f"the tools to choose from make a grammar of {len(data)} bytes; {MAX_GRAMMAR_BYTES} are possible"
        )
    return Grammar(kind=kind, text=data)


def _offered(question: Question) -> tuple[Tool, ...]:
    """Tools that the model is told about."""
    return () if question.tool_choice == NONE else question.tools


def _trace(question: Question) -> Trace | None:
    """As the pipe has it."""
    place = read_traceparent(question.traceparent)
    return None if place is None else Trace(id=place.trace_id, span=place.span_id, sampled=place.sampled)


def _adapter(question: Question) -> str:
    """As `Request` names it."""
    if question.adapter is None:
        return RELEASED
    return "" if question.adapter == NO_ADAPTER else question.adapter
