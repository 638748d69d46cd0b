"""Questions in words, with a real tokenizer whose tokens are single bytes."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from trio.testing import MockClock

from meshnode.core.errors import ContentUnavailable, Declined, FatalError, ModelError, PeerUnreachable
from meshnode.core.signal import Changes
from meshnode.model.facts import facts_of
from meshnode.model.release import ServedRelease
from meshnode.services.inference.readiness import Readiness
from meshnode.services.inference.receipt import Piece, Receipt, Request
from meshnode.services.inference.text import (
    PATIENCE_S,
    Question,
    Text,
    TextService,
    Waiting,
)
from meshnode.sim.model import ModelSpec, make_model
from meshnode.store.port import OpenFile
from protocols.ids import RAW, Cid, cid_of
from protocols.manifest.messages import FileRef, Manifest
from protocols.pipe.messages import Sampling
from tests.adverts import key_of

GREEDY = Sampling(seed=0)
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
    fetched: list[str] = field(default_factory=list)
    closed: int = 0
    broken: Exception | None = None

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
        return TextService(self, content, self, self)  # type: ignore[arg-type]

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

    async def generate(self, request: Request) -> AsyncGenerator[Piece | Receipt, None]:
        self.asked.append((request.prompt, request.max_tokens, request.sampling))
        receipt = Receipt((), request.prompt)
        try:
            for token in self.fast.encode(self.reply).ids[: request.max_tokens]:
                await trio.lowlevel.checkpoint()
                yield Piece(token, receipt)
            if self.broken is not None:
                raise self.broken
            receipt.reason = self.reason
            yield receipt
        finally:
            self.closed += 1

    async def ask(self, **question: Any) -> tuple[list[str], Receipt]:
        """The pieces of text and the end of one answer."""
        texts = []
        settings: dict[str, Any] = {"sampling": GREEDY, **question}
        async with aclosing(self.service.answer(Question(**settings))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Receipt):
                    return texts, piece
                assert isinstance(piece, Text)
                texts.append(piece.text)
        raise AssertionError("the end is missing")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_text_is_continued(desk: Desk) -> None:
    texts, answer = await desk.ask(text="say it", max_tokens=20)
    assert texts == list("hello")
    assert (answer.reason, answer.prompt) == ("eos", tuple(desk.fast.encode("say it").ids))
    assert desk.asked == [(answer.prompt, 20, GREEDY)]


async def test_tokens_go_as_they_are(desk: Desk) -> None:
    _, answer = await desk.ask(tokens=(5, 6, 7))
    assert answer.prompt == (5, 6, 7)


async def test_turns_pass_through_the_template_of_the_model(desk: Desk) -> None:
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi {{ 7 * 7 }}"})
    _, answer = await desk.ask(turns=turns)
    assert desk.fast.decode(list(answer.prompt)) == "[system]Be kind.[user]hi {{ 7 * 7 }}[assistant]"


async def test_characters_of_several_tokens_come_whole(desk: Desk) -> None:
    desk.reply = "für 🎲"
    texts, _ = await desk.ask(text="x")
    assert "".join(texts) == "für 🎲"
    assert not any("�" in text for text in texts)
    assert texts.count("") == 1 + 3, "what is not complete waits"


async def test_the_end_token_is_not_shown(desk: Desk) -> None:
    desk.reply = "bye</s>"
    texts, _ = await desk.ask(text="x")
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
    texts, answer = await desk.ask(text="x", stop=stops)
    assert ("".join(texts), answer.reason) == (shown, reason)
    assert desk.closed == 1, "the generation was ended"


async def test_the_length_ends_the_answer(desk: Desk) -> None:
    desk.reason = "length"
    texts, answer = await desk.ask(text="x", max_tokens=2)
    assert (texts, answer.reason) == (["h", "e"], "length")


async def test_who_goes_away_ends_the_generation(desk: Desk) -> None:
    async with aclosing(desk.service.answer(Question(text="x", sampling=GREEDY))) as pieces:
        await anext(pieces)
    assert desk.closed == 1


async def test_an_error_of_the_mesh_comes_through(desk: Desk) -> None:
    desk.broken = PeerUnreachable("the node bob went away")
    with pytest.raises(PeerUnreachable, match="bob went away"):
        await desk.ask(text="x")


async def test_the_tokenizer_is_loaded_once_for_each_release(desk: Desk) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(desk.service.tokenizer)
    assert desk.fetched == ["tokenizer.json", "chat_template.jinja"]
    desk.cid = Cid("release-2")
    await desk.ask(text="x")
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
        await desk.ask(text="x")
    assert opened
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


async def test_a_load_that_failed_is_tried_again(desk: Desk) -> None:
    path = desk.folder / "tokenizer.json"
    good = path.read_text()
    path.write_text("{}")
    with pytest.raises(ModelError, match="can't be read"):
        await desk.ask(text="x")
    path.write_text(good)
    assert (await desk.ask(text="x"))[1].reason == "eos"


async def test_without_a_model_that_is_said(desk: Desk) -> None:
    desk.manifest = None
    with pytest.raises(Declined, match="meshnode model add") as caught:
        await desk.ask(text="x")
    assert caught.value.code == "no-model"


async def test_a_model_without_tokenizer_or_template_says_what_is_possible(desk: Desk) -> None:
    assert desk.manifest is not None
    desk.manifest = replace(desk.manifest, files={})
    with pytest.raises(Declined, match="ask in tokens") as caught:
        await desk.ask(text="x")
    assert caught.value.code == "no-tokenizer"
    desk.manifest = replace(desk.manifest, files={"tokenizer.json": desk.file("tokenizer.json")})
    with pytest.raises(FatalError, match="no chat template; ask with plain text"):
        await desk.ask(turns=({"role": "user", "content": "hi"},))


async def test_turns_that_the_template_refuses(desk: Desk) -> None:
    with pytest.raises(Declined, match="no tools here") as caught:
        await desk.ask(turns=({"role": "tool", "content": "hi"},))
    assert caught.value.code == "bad-request"


@pytest.mark.parametrize(
    "text", ["{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 1/0 }}"]
)
async def test_a_template_can_not_break_out(desk: Desk, text: str) -> None:
    (desk.folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(Declined, match="chat template"):
        await desk.ask(turns=({"role": "user", "content": "hi"},))


async def test_a_template_that_is_none_is_the_fault_of_the_model(desk: Desk) -> None:
    (desk.folder / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(ModelError, match="template can't be read"):
        await desk.ask(text="x")


@pytest.mark.parametrize("comes", [True, False])
async def test_a_chain_that_does_not_answer_yet_is_given_a_while(
    desk: Desk, comes: bool, autojump_clock: MockClock
) -> None:
    desk.now = Readiness(False, "it has just started")
    began = trio.current_time()
    async with aclosing(desk.service.answer(Question(text="x", sampling=GREEDY))) as pieces:
        assert await anext(pieces) == Waiting("it has just started")
        if comes:
            desk.now = Readiness(True, "")
            desk.changes.notify()
        assert isinstance(await anext(pieces), Text)
    assert (trio.current_time() - began >= PATIENCE_S) == (not comes)
