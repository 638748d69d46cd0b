"""The HTTP door: status codes, streams, clients that leave, nonsense, keys, pages of others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from meshnode.core.errors import BadRequest, Declined, PeerUnreachable
from meshnode.http import body, connection, delivery, events, server
from meshnode.http.metrics import Metrics
from meshnode.services.inference.receipt import Waiting
from meshnode.state.api_keys import make_key, revoke_key
from tests.http_rig import FakeDoor, serving

CHAT = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**CHAT, "stream": True}
GREETING = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"


def lines_of(text: str) -> list[Any]:
    """The data of server-sent events."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) if line != "[DONE]" else line for line in found]


async def test_what_goes_wrong_before_the_answer_has_a_status() -> None:
    cases: list[tuple[Exception, int, str]] = [
        (BadRequest("no"), 400, "invalid_value"),
        (Declined("too-long", "the prompt has 99 tokens"), 400, "context_length_exceeded"),
        (Declined("forbidden", "no"), 403, "forbidden"),
        (Declined("no-route", "nobody serves layer 3"), 503, "not_ready"),
        (Declined("busy", "no", retry_ms=2500), 503, "overloaded"),
        (PeerUnreachable("PEER went away"), 503, "overloaded"),
        (RuntimeError("wires crossed"), 500, "internal_error"),
    ]
    async with serving() as http:
        for error, status, code in cases:
            http.door.error = error
            for asked in (CHAT, STREAM):
                got = await http.post("/v1/chat/completions", asked)
                assert (got.status_code, got.json()["error"]["code"]) == (status, code), error
        assert "wires" not in got.text
        http.door.error = Declined("busy", "no", retry_ms=2500)
        assert (await http.post("/v1/chat/completions", CHAT)).headers["retry-after"] == "3"
        http.door.error = PeerUnreachable("PEER went away")
        assert "laptop (PEER)" in (await http.post("/v1/chat/completions", CHAT)).text
        http.door.error = None
        http.door.offered = ()
        assert (await http.post("/v1/chat/completions", CHAT)).status_code == 503
        assert (await http.get("/readyz")).status_code == 503


async def test_what_goes_wrong_in_the_middle_ends_the_stream_in_words() -> None:
    door = FakeDoor()
    door.error, door.error_after = PeerUnreachable("PEER went away"), 2
    async with serving(door) as http:
        got = await http.post("/v1/chat/completions", STREAM)
        assert got.status_code == 200
        *_, last, done = lines_of(got.text)
        assert (last["error"]["message"], done) == ("laptop (PEER) went away", "[DONE]")
        got = await http.post("/v1/messages", {**STREAM, "max_tokens": 9})
        assert lines_of(got.text)[-1]["error"]["type"] == "overloaded_error"
        got = await http.post("/api/chat", CHAT)
        assert json.loads(got.text.splitlines()[-1]) == {"error": "laptop (PEER) went away"}
        got = await http.post("/v1/responses", {"input": "x", "stream": True})
        assert lines_of(got.text)[-1]["type"] == "response.failed"


async def test_signs_of_life_while_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "HOLD_S", 0.02)
    monkeypatch.setattr(delivery, "PING_S", 0.02)
    door = FakeDoor()
    door.before, door.hold = [Waiting("the mesh is starting")], trio.Event()
    async with serving(door) as http, httpx.AsyncClient() as client:
        async with client.stream("POST", http.url + "/v1/chat/completions", json=STREAM) as answer:
            pings = 0
            async for line in answer.aiter_lines():
                pings += line == ": ping"
                if pings == 3:
                    door.hold.set()
            assert pings >= 3
        door.hold = trio.Event()
        asked = {**STREAM, "max_tokens": 9}
        async with client.stream("POST", http.url + "/v1/messages", json=asked) as answer:
            lines = answer.aiter_lines()
            seen = [await anext(lines) for _ in range(30)]
            assert sum(line == "event: ping" for line in seen) >= 3


@pytest.mark.parametrize("asked", [CHAT, STREAM])
async def test_a_client_that_leaves_ends_its_question(asked: dict[str, Any]) -> None:
    door = FakeDoor()
    door.hold = trio.Event()
    async with serving(door) as http:
        raw = json.dumps(asked).encode()
        stream = await http.raw(GREETING + b"content-length: %d\r\n\r\n%s" % (len(raw), raw))
        await door.begun.wait()
        await stream.aclose()
        with trio.fail_after(10):
            await door.ended.wait()


async def test_a_client_that_reads_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_S", 0.2)
    door = FakeDoor(["x" * 65536] * 400)
    async with serving(door) as http:
        raw = json.dumps({**STREAM, "max_tokens": 400}).encode()
        stream = await http.raw(GREETING + b"content-length: %d\r\n\r\n%s" % (len(raw), raw))
        with trio.fail_after(20):
            await door.ended.wait()
        await stream.aclose()
        assert (await http.get("/healthz")).status_code == 200


async def answer_to(http: Any, data: bytes) -> bytes:
    """All that comes back."""
    stream = await http.raw(data)
    got = b""
    with trio.move_on_after(20):
        while piece := await stream.receive_some(65536):
            got += piece
    await stream.aclose()
    return bytes(got)


async def test_nonsense_gets_an_honest_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.3)
    monkeypatch.setattr(body, "BODY_S", 0.3)
    async with serving() as http:
        large = b"content-length: 104857600\r\n\r\n"
        assert b" 413 " in await answer_to(http, GREETING + large + b"x" * 1000)
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            got = await answer_to(http, GREETING + b"transfer-encoding: chunked\r\n\r\n" + piece * 200)
        except trio.BrokenResourceError:  # it has hung up while we were still sending
            got = b" 413 "
        assert b" 413 " in got
        assert b" 408 " in await answer_to(http, GREETING + b"content-length: 9\r\n\r\n{")
        flood = b"".join(b"x-%d: %s\r\n" % (i, b"y" * 100) for i in range(1000))
        try:
            got = await answer_to(http, b"GET / HTTP/1.1\r\nhost: localhost\r\n" + flood + b"\r\n")
        except trio.BrokenResourceError:
            got = b" 431 "
        assert b" 431 " in got
        assert b" 400 " in await answer_to(http, b"\x16\x03\x01 nonsense\r\n\r\n")
        assert await answer_to(http, b"") == b""  # says nothing, and is let go
        assert await answer_to(http, b"GET / HTT") == b""
        upgrade = (
            b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n\r\n"
        )
        assert b" 101 " not in await answer_to(http, b"GET / HTTP/1.1\r\nhost: localhost\r\n" + upgrade)
        for wrong in (b"", b"{", b"[]", b"nul", b"[" * 100_000, b"\xff\xfe"):
            async with httpx.AsyncClient() as client:
                got_ = await client.post(http.url + "/v1/chat/completions", content=wrong)
            assert (got_.status_code, got_.json()["error"]["code"]) == (400, "invalid_value"), wrong
        assert (await http.get("/v1/nothing")).status_code == 404
        assert (await http.get("/v1/chat/completions")).status_code == 405
        assert http.door.asked == []


async def test_no_more_connections_than_it_can_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    async with serving() as http:
        held = [await http.raw(b"GET ") for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert b" 503 " in await answer_to(http, b"")
        for stream in held:
            await stream.aclose()
        with trio.fail_after(10):
            while (await http.get("/healthz")).status_code != 200:
                pass


async def test_a_wrong_key_reaches_nothing() -> None:
    async with serving(keyed=True) as http:

        def key(**more: Any) -> dict[str, str]:
            scopes = more.pop("scopes", ("infer",))
            _, text = make_key(http.state, "me", scopes=scopes, now_ms=1, **more)
            return {"authorization": f"Bearer {text}"}

        ask: Callable[..., Any] = lambda headers: http.post("/v1/chat/completions", CHAT, headers=headers)  # noqa: E731
        good = key()
        broken = {"authorization": good["authorization"][:-1] + "!"}
        for headers in ({}, broken, {"x-api-key": "none"}, key(expires_ms=2)):
            assert (await ask(headers)).status_code == 401
        assert (await ask(key(scopes=("feedback",)))).status_code == 403
        assert http.door.asked == []
        assert (await ask(good)).status_code == 200
        secret = good["authorization"].removeprefix("Bearer ")
        assert (await http.post("/v1/messages", {**CHAT, "max_tokens": 2}, headers={"x-api-key": secret})).is_success
        assert (await http.get("/metrics", headers=good)).status_code == 403
        assert (await http.get("/metrics", headers=key(scopes=("admin",)))).status_code == 200
        assert (await http.get("/healthz")).status_code == 200
        slow = key(requests_per_minute=2)
        assert [(await ask(slow)).status_code for _ in range(3)] == [200, 200, 429]
        few = key(tokens_per_day=7)  # an answer has six with its prompt
        assert [(await ask(few)).status_code for _ in range(3)] == [200, 200, 429]
        asked = [question.asker for question in http.door.asked[-4:]]
        assert len(set(asked)) == 2 and all(asked), "prompts of one key are kept for that key alone"
        revoke_key(http.state, secret.split("-")[1], 5)
        assert (await ask(good)).status_code == 401


async def test_an_answer_belongs_to_the_trace_of_its_request() -> None:
    """What is no `traceparent` is ignored, as W3C wants it; the node begins a trace of its own then."""
    async with serving() as http:
        body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        for given in ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "nonsense", None):
            headers = {} if given is None else {"traceparent": given}
            response = await http.post("/v1/chat/completions", body, headers=headers)
            assert response.status_code == 200
            assert http.door.asked[-1].traceparent == (given or "")


async def test_pages_of_others_may_not_ask() -> None:
    async with serving(origins=["https://chat.example"]) as http:
        for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"origin": "null"}):
            got = await http.post("/v1/chat/completions", CHAT, headers=headers)
            assert got.status_code == 403, headers
        assert http.door.asked == []
        named = {"origin": "https://chat.example"}
        got = await http.post("/v1/chat/completions", CHAT, headers=named)
        assert (got.status_code, got.headers["access-control-allow-origin"]) == (200, "https://chat.example")
        async with httpx.AsyncClient() as client:
            asking = {**named, "access-control-request-headers": "authorization, content-type"}
            before = await client.options(http.url + "/v1/chat/completions", headers=asking)
        assert before.headers["access-control-allow-headers"] == "authorization, content-type"
        assert (await http.post("/v1/chat/completions", CHAT, headers={"origin": http.url})).status_code == 200


async def test_receipts_and_feedback() -> None:
    async with serving() as http:
        answer = await http.post("/v1/chat/completions", CHAT, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-meshnode-route"] == "A:0-2, B:2-4"
        receipt = (await http.get(f"/v1/receipts/{answer.json()['id']}")).json()
        assert receipt["answers"][0]["cached_tokens"] == 2
        assert receipt["answers"][0]["route"][1] == {"peer": "B", "first": 2, "last": 4}
        assert "text" not in receipt["answers"][0]
        judged = await http.post("/v1/feedback", {"answer": answer.json()["id"], "correct": True})
        assert judged.json() == {"object": "feedback", "answer": "7", "correct": True, "label": ""}
        assert (await http.post("/v1/feedback", {"answer": "chatcmpl-0", "correct": True})).status_code == 404


async def test_figures_and_their_page() -> None:
    async with serving() as http:
        await http.post("/v1/chat/completions", {**CHAT, "n": 2})
        await http.get("/%2e/unknown")
        page = (await http.get("/metrics")).text
        assert "meshnode_generation_tokens_total 6.0" in page
        assert "meshnode_prefix_cache_queries_total 6.0" in page
        assert "meshnode_prefix_cache_hits_total 4.0" in page
        assert 'meshnode_request_success_total{finished_reason="length"} 2.0' in page
        assert 'meshnode_http_responses_total{route="/v1/chat/completions",status="200"} 1.0' in page
        assert 'route="none",status="404"' in page
        assert "meshnode_num_requests_waiting 0.0" in page
        assert "meshnode_inter_token_latency_seconds_count 4.0" in page


async def test_events_tell_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LEAST_S", 0.0)
    async with (
        serving() as http,
        httpx.AsyncClient() as client,
        client.stream("GET", http.url + "/events") as answer,
        aclosing(answer.aiter_lines()) as lines,
    ):
        assert await anext(lines) == "event: status"
        assert json.loads((await anext(lines)).removeprefix("data: "))["sessions"] == 0
        await http.post("/v1/chat/completions", CHAT)
        http.door.news.set()
        async for line in lines:
            if line.startswith("data: "):
                assert json.loads(line.removeprefix("data: "))["sessions"] == 1
                break


async def test_the_openapi_document_names_every_route() -> None:
    async with serving() as http:
        document = (await http.get("/openapi.json")).json()
        routes = {(way.path.replace(":path}", "}"), way.method.lower()) for way in http.app.ways()}
        assert {(path, method) for path, methods in document["paths"].items() for method in methods} == routes


def test_the_page_of_figures_lists_every_one() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `(\w+)` \| (\w+) \| .*? \| (.*?) \|\n", page)
    listed = {name: (kind, text) for name, kind, text in rows}
    found = {}
    for family in Metrics().registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = (family.type, family.documentation)
    assert listed == found


async def test_a_node_that_stops_waits_for_no_reader() -> None:
    door = FakeDoor(["x" * 65536] * 400)
    with trio.fail_after(10):
        async with serving(door) as http:
            raw = json.dumps({**STREAM, "max_tokens": 400}).encode()
            stream = await http.raw(GREETING + b"content-length: %d\r\n\r\n%s" % (len(raw), raw))
            await door.begun.wait()
            await trio.testing.wait_all_tasks_blocked(0.05)
    await stream.aclose()
