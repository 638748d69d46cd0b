"""Questions in words: text or chat turns in, text out, through the generations of the origin."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from meshnode.core.errors import Declined, ModelError
from meshnode.core.memory import give_back
from meshnode.core.workers import Threads, Workers
from meshnode.services.inference.readiness import ReadinessService
from meshnode.services.inference.receipt import Generator, Receipt, Request
from meshnode.services.port import Content, Releases
from meshnode.text.stops import StopStrings
from protocols.ids import Cid
from protocols.manifest.messages import Manifest
from protocols.pipe.messages import Sampling

if TYPE_CHECKING:
    from meshnode.text.tokenizer import Tokenizer

PATIENCE_S: Final = 10.0  # a mesh that is just starting gets this long before a question is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: exactly one of `turns`, `text` and `tokens`. `api/question.py` has checked it."""

    turns: tuple[Mapping[str, str], ...] | None = None  # chat: {"role", "content"}
    text: str | None = None  # continued as it stands
    tokens: tuple[int, ...] | None = None
    max_tokens: int = 512
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer: the token, and the text that it completes (maybe none)."""

    text: str
    token: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """The chain does not answer yet; it is given `PATIENCE_S`."""

    why: str


def _prompt(tokenizer: Tokenizer, question: Question) -> tuple[int, ...]:
    if question.tokens is not None:
        return question.tokens
    if question.text is not None:
        return tokenizer.encode(question.text)
    return tokenizer.chat(question.turns or ())


class TextService:
    """Holds the tokenizer of the served model, loaded when the first question comes."""

    def __init__(
        self,
        releases: Releases,
        content: Content,
        origin: Generator,
        readiness: ReadinessService,
        workers: Workers = Threads(),
    ) -> None:
        self._releases = releases
        self._content = content
        self._origin = origin
        self._readiness = readiness
        self._workers = workers
        self._loaded: tuple[Cid, Tokenizer] | None = None
        self._loading = trio.Lock()

    async def tokenizer(self) -> Tokenizer:
        """Of the model that is served now. Raises Declined `no-model`, ContentUnavailable, ModelError."""
        release = self._releases.current
        if release is None:
            raise Declined("no-model", self._releases.why_none)
        async with self._loading:
            if self._loaded is None or self._loaded[0] != release.cid:
                self._loaded = (release.cid, await self._load(release.manifest))
            return self._loaded[1]

    async def _load(self, manifest: Manifest) -> Tokenizer:
        if "tokenizer.json" not in manifest.files:
            raise Declined(
                "no-tokenizer", f"the model {manifest.name} was published without a tokenizer; ask in tokens"
            )
        vocabulary = manifest.files["tokenizer.json"]
        template_ref = manifest.files.get("chat_template.jinja")
        shape = manifest.architecture
        with ExitStack() as opened:
            path = opened.enter_context(await self._content.open(vocabulary))
            template_path: Path | None = None
            if template_ref is not None:
                template_path = opened.enter_context(await self._content.open(template_ref))

            def load() -> Tokenizer:
                from meshnode.text.tokenizer import Tokenizer  # 10 MB that a node which is never asked does without

                template: str | None = None
                if template_path is not None:
                    try:
                        template = template_path.read_text(encoding="utf-8")
                    except UnicodeDecodeError as error:
                        raise ModelError(
                            f"the chat template of {manifest.name} can't be read: {error}; publish the model again"
                        ) from error
                tokenizer = Tokenizer(path, template, bos_ids=shape.bos_ids, eos_ids=shape.eos_ids)
                give_back()
                return tokenizer

            return await self._workers.run(load)

    async def answer(self, question: Question) -> AsyncGenerator[Waiting | Text | Receipt, None]:
        """The answer piece by piece, at last its receipt. Use it in `contextlib.aclosing`.

        A chain that does not answer yet is waited for a while first.

        Raises what `Generator.generate` raises, ContentUnavailable, ModelError, and Declined by the chat template.

        If cancelled or closed: the generation ends.
        """
        if not self._readiness.now.ready:
            yield Waiting(self._readiness.now.sentence)
            with trio.move_on_after(PATIENCE_S):  # whatever is wrong then is said by the attempt itself
                await self._readiness.wait_ready()
        tokenizer = await self.tokenizer()
        # In a thread: a long text takes a second, and the template came with the model.
        prompt = await self._workers.run(_prompt, tokenizer, question, abandon_on_cancel=True)
        words, stops = tokenizer.stream(prompt), StopStrings(question.stop)
        request = Request(prompt, question.max_tokens, question.sampling)
        async with aclosing(self._origin.generate(request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Receipt):
                    if rest := stops.rest():
                        yield Text(rest, -1)
                    yield piece
                    return
                shown, met = stops.feed(words.feed(piece.token))
                yield Text(shown, piece.token)
                if met:
                    piece.receipt.reason = "stop"
                    yield piece.receipt
                    return
