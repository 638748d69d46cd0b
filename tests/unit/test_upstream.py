"""Models of a member's own server: messages, a real HTTP server asked, what programs see."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from meshnode.api.upstream import body_of
from meshnode.config.values import model_names, server_url
from meshnode.core.errors import BadRequest, Declined, TransientError
from meshnode.text.question import Question
from meshnode.upstream.server import UpstreamServer
from protocols.codec import encode
from protocols.errors import RemoteProtocolError
from protocols.upstream.messages import MESSAGES, Ask, End, Offers, Piece, Refused, read_offers
from tests.http_rig import MODEL, FakeDoor, serving
from tests.http_server import Request, Site, site
from tests.vectors import Case, hold

ASKED = {"model": "llama3:8b", "messages": [{"role": "user", "content": "hello"}]}
HERE = replace(MODEL, name="llama3:8b", manifest="", variant="upstream", upstream="kitchen")


def test_vectors() -> None:
    full = End(reason="length", prompt_tokens=7, tokens=8)
    refused = Refused(code="busy", reason="come again")
    hold(
        "upstream",
        [
            Case("a question", MESSAGES.encode(Ask(model="llama3:8b")), Ask(model="llama3:8b")),
            Case("a piece", MESSAGES.encode(Piece()), Piece()),
            Case("an end without counts", MESSAGES.encode(End(reason="stop")), End(reason="stop")),
            Case("an end", MESSAGES.encode(full), full),
            Case("a refusal", MESSAGES.encode(refused), refused),
            Case("with a byte more", MESSAGES.encode(refused) + b"\x00"),
            Case("nothing", b""),
        ],
        MESSAGES.decode,
    )


@pytest.mark.parametrize("models", [("",), ("a\nb",), ("x" * 129,), ("twice", "twice")])
def test_offers_that_can_not_be_meant(models: tuple[str, ...]) -> None:
    assert read_offers(encode(Offers(models=("llama3:8b", "qwen")))).models == ("llama3:8b", "qwen")
    with pytest.raises(RemoteProtocolError):
        read_offers(encode(Offers(models=models)))


def events(*said: Any, end: str = "data: [DONE]\n\n") -> Callable[[Request], None]:
    def scene(request: Request) -> None:
        body = "".join(f"data: {json.dumps(one)}\n\n" for one in said) + end
        request.reply(body.encode(), Content_Type="text/event-stream")

    return scene


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


async def answer(here: Site) -> list[str | End]:
    async with aclosing(UpstreamServer(here.url).answer(ASKED)) as said:
        return [one async for one in said]


async def test_a_server_is_asked_as_openai_has_it() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    with site(events(piece("Hel"), piece("lo", "stop"), usage)) as here:
        assert await answer(here) == ["Hel", "lo", End(reason="stop", prompt_tokens=9, tokens=2)]
        assert here.paths == ["/v1/chat/completions"]
        asked = json.loads(here.bodies[0])
        assert (asked["model"], asked["stream"], asked["messages"]) == ("llama3:8b", True, ASKED["messages"])


@pytest.mark.parametrize(
    ("scene", "kind", "words"),
    [
        (
            lambda r: r.reply(b'{"error":{"message":"no such model"}}', 404),
            Declined,
            "no model .*: no such model",
        ),
        (lambda r: r.reply(b'{"error":"too long"}', 400), Declined, "can't answer this: too long"),
        (lambda r: r.reply(b"<html>", 500), TransientError, "refuses: status 500"),
        (lambda r: r.reply(b"", 302, Location="http://127.0.0.1:1/"), TransientError, "refuses: status 302"),
        (events(piece("Hel"), end=""), TransientError, "broke off in the middle"),
        (events(["no", "object"]), TransientError, "no piece of an answer"),
        (events({"choices": [{"delta": {"content": 7}}]}), TransientError, "sent no text"),
        (events({"error": {"message": "out of memory"}}), TransientError, "broke off: out of memory"),
        (lambda r: r.reply(b"x" * (2 << 20)), TransientError, "has more than 1048576 bytes"),
    ],
)
async def test_what_servers_do_wrong(scene: Callable[[Request], None], kind: type[Exception], words: str) -> None:
    with site(scene) as here, pytest.raises(kind, match=words):
        await answer(here)


async def test_a_server_that_is_not_there() -> None:
    with pytest.raises(TransientError, match="can't be asked"):
        async with aclosing(UpstreamServer("http://127.0.0.1:1").answer(ASKED)) as said:
            [one async for one in said]


def test_what_is_passed_on_and_what_is_not() -> None:
    question = Question(messages=({"role": "user", "content": "x"},), max_tokens=5, seed=3, stop=("END",))
    body = body_of(question)
    assert (body["max_tokens"], body["seed"], body["stop"]) == (5, 3, ["END"])
    assert body_of(Question(prompt="x"))["prompt"] == "x"
    for wrong in (replace(question, logprobs=1), Question(token_ids=(1,)), replace(question, top_k=5)):
        with pytest.raises(BadRequest, match="can't be passed on to a server of a member"):
            body_of(wrong)


async def test_it_is_marked_and_asked_by_name_only() -> None:
    door = FakeDoor()
    door.offered = (MODEL, HERE)
    async with serving(door) as http:
        ours, theirs = (await http.get("/v1/models")).json()["data"]
        assert "upstream" not in ours
        assert (theirs["id"], theirs["owned_by"]) == ("llama3:8b", "a server of kitchen")
        tags = (await http.get("/api/tags")).json()["models"]
        assert (tags[1]["name"], tags[1]["remote_host"]) == ("llama3:8b", "kitchen")
        for model in ("auto", "small", None):
            assert (await http.post("/v1/chat/completions", {**ASKED, "model": model})).status_code == 200
        assert door.upstream == []
        assert (await http.post("/v1/chat/completions", ASKED)).status_code == 200
        assert door.upstream == ["llama3:8b"]
        refused = await http.post("/v1/embeddings", {"model": "llama3:8b", "input": "x"})
        assert refused.status_code == 400
        assert "runs on a server of kitchen" in refused.json()["error"]["message"]
        door.offered = (HERE,)
        assert (await http.post("/v1/chat/completions", {**ASKED, "model": "auto"})).status_code == 503


def test_settings() -> None:
    assert server_url("http://127.0.0.1:11434/") == "http://127.0.0.1:11434"
    assert server_url("") == ""
    assert model_names("llama3:8b, qwen") == model_names(["llama3:8b", "qwen"]) == ("llama3:8b", "qwen")
    for url in ("11434", "ftp://x", "http://a b", 7):
        with pytest.raises(ValueError, match="is not an address like http"):
            server_url(url)
    for names in (7, ["a@b"], [""], [str(number) for number in range(33)]):
        with pytest.raises(ValueError, match="name"):
            model_names(names)
