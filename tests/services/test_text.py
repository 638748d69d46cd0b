"""Questions in words, with a real tokenizer whose tokens are single bytes."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from trio.testing import MockClock

from meshnode.core.errors import (
    BadRequest,
    ContentUnavailable,
    Declined,
    FatalError,
    ModelError,
    PeerUnreachable,
    TokenizerLost,
)
from meshnode.core.signal import Changes
from meshnode.model.fit import facts_of
from meshnode.model.release import ServedRelease
from meshnode.services.inference.readiness import Readiness
from meshnode.services.inference.receipt import RELEASED, Piece, Receipt, Request, Taken, Vector, Waiting
from meshnode.services.inference.text import (
    LONG_PROMPT,
    PATIENCE_S,
    Called,
    Started,
    Text,
    TextService,
)
from meshnode.sim.model import ModelSpec, make_model
from meshnode.store.port import OpenFile
from meshnode.text.in_process import TokenizerInProcess, open_in_process
from meshnode.text.port import MAX_TOKENIZER_BYTES, Tokenizer, TokenizerFiles
from meshnode.text.question import Question, read_question
from meshnode.text.tool_calls import ToolCall
from protocols.ids import DAG_CBOR, RAW, Cid, cid_of
from protocols.manifest.messages import FileRef, Manifest
from protocols.pipe.messages import Chance, Grammar, Sampling
from tests.adverts import key_of

GREEDY: dict[str, Any] = {"temperature": 0, "top_p": 1, "seed": 0}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
EOS = 1


def build_tokenizer(folder: Path) -> Path:
    """tokenizer.json: two special tokens, then one token for each byte."""
    vocabulary = {"<s>": 0, "</s>": EOS}
    vocabulary |= {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = FastTokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    path = folder / "tokenizer.json"
    fast.save(str(path))
    return path


@dataclass
class Desk:
    """An answering service over a folder of files, and a model that says `reply`."""

    folder: Path
    manifest: Manifest | None = None
    cid: Cid = Cid("release-1")
    reply: str = "hello"
    reason: str = "eos"
    asked: list[tuple[tuple[int, ...], int, Sampling]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)  # that were asked for
    grammars: list[Grammar | None] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    closed: int = 0
    broken: Exception | None = None
    refusal: Declined | None = None
    tokenizers: list[TokenizerInProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fast = FastTokenizer.from_file(str(build_tokenizer(self.folder)))
        (self.folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        self.manifest = replace(
            make_model(ModelSpec(), key_of(1), 1).manifest, files={name: self.file(name) for name in self.files}
        )
        self.changes = Changes()
        self.why_none = "add one with: meshnode model add PATH"
        self.now = Readiness(True, "")
        self.service = self.open_service(self)

    def open_service(self, content: Any) -> TextService:
        """Asks us for everything else."""
        return TextService(self, content, self, self, random.Random(0), self.open_tokenizer)  # type: ignore[arg-type]

    async def open_tokenizer(self, files: TokenizerFiles) -> Tokenizer:
        tokenizer = await open_in_process(files)
        self.tokenizers.append(tokenizer)
        return tokenizer

    @property
    def current(self) -> ServedRelease | None:
        made = self.manifest
        return None if made is None else ServedRelease(self.cid, "int4", made, facts_of(made, "int4"))

    async def wait_ready(self) -> None:
        while not self.now.ready:
            await self.changes.wait()

    files = ("tokenizer.json", "chat_template.jinja")

    def file(self, name: str) -> FileRef:
        return FileRef(cid=cid_of(RAW, name.encode()), size=len(name))

    async def open(self, file: FileRef) -> OpenFile:
        await trio.lowlevel.checkpoint()
        (name,) = [name for name in self.files if self.file(name) == file]
        self.fetched.append(name)
        return OpenFile(self.folder / name)

    def check_may_ask(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def generate(self, request: Request) -> AsyncGenerator[Taken | Piece | Vector | Receipt, None]:
        self.asked.append((request.prompt, request.max_tokens, request.sampling))
        assert self.current is not None
        self.adapters.append(request.adapter)
        self.grammars.append(request.grammar)
        receipt = Receipt((), request.prompt, self.current)
        try:
            yield Taken()
            if request.pooled:
                yield Vector((0.6, 0.8))
                yield receipt
                return
            for token in self.fast.encode(self.reply).ids[: request.max_tokens]:
                await trio.lowlevel.checkpoint()
                told = (Chance(token=token, nano_nats=500_000_000), Chance(token=7, nano_nats=1))
                yield Piece(token, receipt, told[: request.sampling.chances])
            if self.broken is not None:
                raise self.broken
            receipt.reason = self.reason
            yield receipt
        finally:
            self.closed += 1

    async def ask(self, **question: Any) -> tuple[list[str], Receipt]:
        """The pieces of text and the end of one answer."""
        texts = []
        settings = {**GREEDY, **question}
        async with aclosing(self.service.answer(Question(**settings))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Receipt):
                    return texts, piece
                if isinstance(piece, Started):
                    continue
                assert isinstance(piece, Text)
                texts.append(piece.text)
        raise AssertionError("the end is missing")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_text_is_continued(desk: Desk) -> None:
    texts, answer = await desk.ask(prompt="say it", max_tokens=20)
    assert texts == list("hello")
    assert (answer.reason, answer.prompt) == ("eos", tuple(desk.fast.encode("say it").ids))
    assert desk.asked == [(answer.prompt, 20, Sampling(seed=0))]


async def test_tokens_go_as_they_are(desk: Desk) -> None:
    _, answer = await desk.ask(token_ids=(5, 6, 7))
    assert answer.prompt == (5, 6, 7)


async def test_who_answers_is_said_by_the_question(desk: Desk) -> None:
    adapter = cid_of(DAG_CBOR, b"an adapter")
    for asked in (None, "none", adapter):
        await desk.ask(token_ids=(5, 6, 7), adapter=asked)
    assert desk.adapters == [RELEASED, "", adapter]


async def test_turns_pass_through_the_template_of_the_model(desk: Desk) -> None:
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi {{ 7 * 7 }}"})
    _, answer = await desk.ask(messages=turns)
    assert desk.fast.decode(list(answer.prompt)) == "[system]Be kind.[user]hi {{ 7 * 7 }}[assistant]"


async def test_characters_of_several_tokens_come_whole(desk: Desk) -> None:
    desk.reply = "für 🎲"
    texts, _ = await desk.ask(prompt="x")
    assert "".join(texts) == "für 🎲"
    assert not any("�" in text for text in texts)
    assert texts.count("") == 1 + 3, "what is not complete waits"


async def test_the_end_token_is_not_shown(desk: Desk) -> None:
    desk.reply = "bye</s>"
    texts, _ = await desk.ask(prompt="x")
    assert "".join(texts) == "bye"


@pytest.mark.parametrize(
    ("stops", "shown", "reason"),
    [
        (("lo",), "hel", "stop"),
        (("l",), "he", "stop"),
        (("hello",), "", "stop"),
        (("xyz", "ll"), "he", "stop"),
        (("lox",), "hello", "eos"),
        (("o!",), "hello", "eos"),
        ((), "hello", "eos"),
    ],
)
async def test_stop_strings(desk: Desk, stops: tuple[str, ...], shown: str, reason: str) -> None:
    texts, answer = await desk.ask(prompt="x", stop=stops)
    assert ("".join(texts), answer.reason) == (shown, reason)
    assert desk.closed == 1, "the generation was ended"


async def test_the_length_ends_the_answer(desk: Desk) -> None:
    desk.reason = "length"
    texts, answer = await desk.ask(prompt="x", max_tokens=2)
    assert (texts, answer.reason) == (["h", "e"], "length")


async def test_who_goes_away_ends_the_generation(desk: Desk) -> None:
    async with aclosing(desk.service.answer(Question(prompt="x", **GREEDY))) as pieces:
        await anext(pieces)
    assert desk.closed == 1


async def test_an_error_of_the_mesh_comes_through(desk: Desk) -> None:
    desk.broken = PeerUnreachable("the node bob went away")
    with pytest.raises(PeerUnreachable, match="bob went away"):
        await desk.ask(prompt="x")


async def test_the_tokenizer_is_loaded_once_for_each_release(desk: Desk) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(desk.service.tokenizer)
    assert desk.fetched == ["tokenizer.json", "chat_template.jinja"]
    desk.cid = Cid("release-2")
    await desk.ask(prompt="x")
    assert len(desk.fetched) == 4


@pytest.mark.parametrize("trouble", ["fetch", "read"])
async def test_a_load_that_failed_leaves_no_file_open(desk: Desk, trouble: str) -> None:
    """An encrypted file is revealed as a copy in memory, which lives as long as its descriptor."""
    opened: list[int] = []

    class Careful:
        async def open(self, file: FileRef) -> OpenFile:
            if opened and trouble == "fetch":
                raise ContentUnavailable("nobody gives it", cid=file.cid)
            revealed = await desk.open(file)
            opened.append(os.open(revealed.path, os.O_RDONLY))
            return OpenFile(revealed.path, opened[-1])

    (desk.folder / "chat_template.jinja").write_bytes(b"\xff")
    desk.service = desk.open_service(Careful())
    with pytest.raises((ContentUnavailable, ModelError)):
        await desk.ask(prompt="x")
    assert opened
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


async def test_a_load_that_failed_is_tried_again(desk: Desk) -> None:
    path = desk.folder / "tokenizer.json"
    good = path.read_text()
    path.write_text("{}")
    with pytest.raises(ModelError, match="can't be read"):
        await desk.ask(prompt="x")
    path.write_text(good)
    assert (await desk.ask(prompt="x"))[1].reason == "eos"


async def test_a_tokenizer_that_is_lost_is_opened_again(desk: Desk) -> None:
    await desk.ask(prompt="x")
    await desk.tokenizers[0].aclose()
    assert (await desk.ask(prompt="x"))[1].reason == "eos"
    assert len(desk.tokenizers) == 2


@pytest.mark.parametrize(("times", "answered"), [(1, True), (2, False)])
async def test_a_tokenizer_that_is_lost_in_a_question_is_asked_again_once(
    desk: Desk, times: int, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TokenizerInProcess.encode
    lost = iter(range(times))

    async def dies(tokenizer: TokenizerInProcess, text: str) -> tuple[int, ...]:
        if next(lost, None) is not None:
            await tokenizer.aclose()
            raise TokenizerLost("the process has ended")
        return await encode(tokenizer, text)

    monkeypatch.setattr(TokenizerInProcess, "encode", dies)
    if answered:
        assert (await desk.ask(prompt="x"))[1].reason == "eos"
    else:
        with pytest.raises(TokenizerLost):
            await desk.ask(prompt="x")


async def test_the_tokenizer_ends_with_the_node_and_with_its_release(desk: Desk) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.service.run)
        await desk.ask(prompt="x")
        desk.cid = Cid("release-2")
        await desk.ask(prompt="x")
        assert [tokenizer.lost for tokenizer in desk.tokenizers] == [True, False]
        nursery.cancel_scope.cancel()
    assert [tokenizer.lost for tokenizer in desk.tokenizers] == [True, True]


async def test_a_file_that_is_too_large_is_not_even_fetched(desk: Desk) -> None:
    assert desk.manifest is not None
    huge = replace(desk.file("tokenizer.json"), size=MAX_TOKENIZER_BYTES + 1)
    desk.manifest = replace(desk.manifest, files={"tokenizer.json": huge})
    with pytest.raises(ModelError, match=rf"{MAX_TOKENIZER_BYTES + 1} bytes; {MAX_TOKENIZER_BYTES} are possible"):
        await desk.ask(prompt="x")
    assert desk.fetched == []


async def test_a_character_that_an_answer_leaves_open_is_broken_unless_it_was_cut(desk: Desk) -> None:
    desk.reply = "a🎲"
    texts, answer = await desk.ask(prompt="x", max_tokens=4)
    assert ("".join(texts), answer.reason) == ("a�", "eos")
    texts, answer = await desk.ask(prompt="x", max_tokens=4, stop=("�",))
    assert ("".join(texts), answer.reason) == ("a", "stop")
    desk.reason = "length"
    texts, answer = await desk.ask(prompt="x", max_tokens=4)
    assert ("".join(texts), answer.reason) == ("a", "length")


@pytest.mark.parametrize("end", ["�", "ä�", "🎲"])
async def test_an_answer_repeats_nothing_of_its_prompt(desk: Desk, end: str) -> None:
    texts, _ = await desk.ask(prompt=f"qzx {end}")
    assert "".join(texts) == "hello"


async def test_who_may_not_ask_does_not_wait(desk: Desk) -> None:
    desk.now = Readiness(False, "nobody is here")
    desk.refusal = Declined("forbidden", "This node may not ask questions: it is no member any more.")
    with pytest.raises(Declined, match="no member any more"):
        await desk.ask(prompt="hi")
    assert not desk.asked


async def test_whoever_waits_for_a_long_prompt_is_told(desk: Desk) -> None:
    for length, words in ((LONG_PROMPT - 1, []), (LONG_PROMPT, [f"it reads the prompt first, {LONG_PROMPT} tokens"])):
        question = Question(token_ids=(1,) * length, max_tokens=1, temperature=0)
        async with aclosing(desk.service.answer(question)) as pieces:
            assert [piece.why async for piece in pieces if isinstance(piece, Waiting)] == words


async def test_a_character_that_the_prompt_left_open_is_completed(desk: Desk) -> None:
    desk.reply = "🎲!"
    dice = desk.fast.encode("🎲").ids
    whole = desk.generate

    async def generate(request: Request) -> AsyncGenerator[Taken | Piece | Receipt, None]:
        skip = 2
        async for piece in whole(request):
            if not isinstance(piece, Piece) or (skip := skip - 1) < 0:
                yield piece

    desk.generate = generate  # type: ignore[method-assign]
    texts, _ = await desk.ask(token_ids=tuple(dice[:2]))
    assert "".join(texts) == "🎲!"


async def test_without_a_model_that_is_said(desk: Desk) -> None:
    desk.manifest = None
    with pytest.raises(Declined, match="meshnode model add") as caught:
        await desk.ask(prompt="x")
    assert caught.value.code == "no-model"


async def test_a_model_without_tokenizer_or_template_says_what_is_possible(desk: Desk) -> None:
    assert desk.manifest is not None
    desk.manifest = replace(desk.manifest, files={})
    with pytest.raises(Declined, match="ask in tokens") as caught:
        await desk.ask(prompt="x")
    assert caught.value.code == "no-tokenizer"
    desk.manifest = replace(desk.manifest, files={"tokenizer.json": desk.file("tokenizer.json")})
    with pytest.raises(FatalError, match="no chat template; ask with plain text"):
        await desk.ask(messages=({"role": "user", "content": "hi"},))


async def test_turns_that_the_template_refuses(desk: Desk) -> None:
    with pytest.raises(Declined, match="no tools here") as caught:
        await desk.ask(messages=({"role": "tool", "content": "hi"},))
    assert caught.value.code == "bad-request"


async def test_a_template_that_is_none_is_the_fault_of_the_model(desk: Desk) -> None:
    (desk.folder / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(ModelError, match="template can't be read"):
        await desk.ask(prompt="x")


@pytest.mark.parametrize("comes", [True, False])
async def test_a_chain_that_does_not_answer_yet_is_given_a_while(
    desk: Desk, comes: bool, autojump_clock: MockClock
) -> None:
    desk.now = Readiness(False, "it has just started")
    began = trio.current_time()
    async with aclosing(desk.service.answer(Question(prompt="x", **GREEDY))) as pieces:
        assert await anext(pieces) == Waiting("it has just started")
        if comes:
            desk.now = Readiness(True, "")
            desk.changes.notify()
        assert isinstance(await anext(pieces), Started)
        assert isinstance(await anext(pieces), Text)
    assert (trio.current_time() - began >= PATIENCE_S) == (not comes)


async def test_how_likely_tokens_were_is_told_on_request(desk: Desk) -> None:
    """Their bytes are those of the text, also where a character takes several tokens."""
    desk.reply = "für</s>"
    async with aclosing(desk.service.answer(Question(prompt="x", **GREEDY, logprobs=1))) as pieces:
        told = [piece for piece in pieces_of([piece async for piece in pieces]) if piece.token >= 0]
    assert desk.asked[0][2].chances == 2
    assert b"".join(piece.likelihood.data for piece in told if piece.likelihood) == "für".encode()
    assert [piece.likelihood.logprob for piece in told if piece.likelihood] == [-0.5, -0.5, -0.5, -0.5, -0.5]
    assert [[best.token for best in piece.likeliest] for piece in told] == [[7]] * 5
    async with aclosing(desk.service.answer(Question(prompt="x", **GREEDY))) as pieces:
        assert not any(piece.likelihood for piece in pieces_of([piece async for piece in pieces]))


async def test_a_text_becomes_one_vector(desk: Desk) -> None:
    found = await desk.service.embed("say it", adapter="none")
    assert found.values == (0.6, 0.8)
    assert found.receipt.prompt == tuple(desk.fast.encode("say it").ids)
    assert desk.adapters == [""]
    assert (await desk.service.embed((5, 6))).receipt.prompt == (5, 6)
    with pytest.raises(BadRequest, match="empty"):
        await desk.service.embed("")


TOOLS = ({"type": "function", "function": {"name": "clock"}},)


async def test_calls_of_tools_are_told_apart_from_text(desk: Desk) -> None:
    desk.reply = 'I look.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call></s>'
    asked = read_question({"messages": [{"role": "user", "content": "Time?"}], "tools": TOOLS, **GREEDY})
    async with aclosing(desk.service.answer(asked)) as pieces:
        told = [piece async for piece in pieces]
    assert "".join(piece.text for piece in pieces_of(told)) == "I look."
    assert [piece.call for piece in told if isinstance(piece, Called)] == [ToolCall("clock", "{}")]
    (receipt,) = [piece for piece in told if isinstance(piece, Receipt)]
    assert receipt.reason == "tool_calls"
    assert "You may call functions" in desk.fast.decode(list(receipt.prompt))
    texts, receipt = await desk.ask(messages=asked.messages, tools=asked.tools, tool_choice="none")
    assert ("".join(texts), receipt.reason) == (desk.reply.removesuffix("</s>"), "eos")
    assert "You may call functions" not in desk.fast.decode(list(receipt.prompt))


async def test_the_form_of_an_answer_goes_with_it(desk: Desk) -> None:
    await desk.ask(prompt="x", form=("regex", "a|b"))
    chat = {"messages": [{"role": "user", "content": "Time?"}], "tools": TOOLS, **GREEDY}
    for choice in ("auto", "clock"):
        async with aclosing(desk.service.answer(read_question({**chat, "tool_choice": choice}))) as pieces:
            async for _ in pieces:
                pass
    regex, auto, clock = desk.grammars
    assert (regex, auto) == (Grammar(kind="regex", text=b"a|b"), None)
    assert clock is not None and clock.kind == "lark" and b'"const": "clock"' in clock.text


def pieces_of(answer: Sequence[object]) -> list[Text]:
    return [piece for piece in answer if isinstance(piece, Text)]
