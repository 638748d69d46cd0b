"""The routes of the HTTP door. Each is one line of table; what they mean stands in the dialects' folders."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Final

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Embedding, plain
from meshnode.core.clock import Wall, monotonic
from meshnode.http.anthropic.messages import question_of_message, read_message
from meshnode.http.anthropic.models import model_document as anthropic_model
from meshnode.http.anthropic.models import models_document as anthropic_models
from meshnode.http.body import Json, read_json
from meshnode.http.border import Border
from meshnode.http.delivery import Delivery
from meshnode.http.dialect import is_anthropic, refuse
from meshnode.http.door import Door, Offered
from meshnode.http.embeddings import check_size, ollama_document, openai_document, texts_of
from meshnode.http.events import Events, Listeners
from meshnode.http.gate import OPEN, Gate
from meshnode.http.json_text import JsonResponse
from meshnode.http.metrics import CONTENT_TYPE, Metrics
from meshnode.http.models import Chosen, choose, computed, find
from meshnode.http.ollama import asking as ollama
from meshnode.http.ollama.models import ps_document, show_document, tags_document, version_document
from meshnode.http.openai.chat import read_chat
from meshnode.http.openai.completions import read_completion
from meshnode.http.openai.history import History
from meshnode.http.openai.models import model_document, models_document
from meshnode.http.openai.responses import read_response
from meshnode.http.openapi import openapi_document
from meshnode.http.page.files import INDEX, Page, wants_page
from meshnode.http.problems import Problem, internal, problem_of
from meshnode.http.receipts import Receipts
from meshnode.http.task import Task
from meshnode.http.ways import Handler, Way
from meshnode.state.api_keys import ApiKey
from meshnode.text.question import Question
from protocols.errors import MeshError

INFER: Final = "infer"
EMBED: Final = "embed"
FEEDBACK: Final = "feedback"
ADMIN: Final = "admin"
GONE: Final = Response(status_code=499)  # nobody reads it

Read = Callable[[Json, Chosen, int], Task]


class App:
    """Answers requests with what a door gives."""

    def __init__(self, door: Door, wall: Wall, gate: Gate, page: Page) -> None:
        self._door = door
        self._wall = wall
        self._gate = gate
        self._page = page
        self._metrics = Metrics()
        self._receipts = Receipts()
        self._history = History()
        self._listeners = Listeners()

    def build(self) -> Border:
        """The ASGI application."""
        routes = [Route(way.path, partial(self._guarded, way), methods=[way.method]) for way in self.ways()]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route, Exception: _bug})
        return Border(app, self._gate, self._metrics)

    def ways(self) -> Sequence[Way]:
        """Every route."""
        response = partial(read_response, self._history)
        asked = ("messages",)
        return (
            Way("POST", "/v1/chat/completions", INFER, "Chat, as OpenAI has it.", self._ask(read_chat), asked),
            Way("POST", "/v1/completions", INFER, "Continue a text.", self._ask(read_completion), ("prompt",)),
            Way("POST", "/v1/responses", INFER, "Responses (OpenAI, Codex).", self._ask(response), ("input",)),
            Way("GET", "/v1/responses/{id}", INFER, "A response that was kept.", self._response),
            Way("DELETE", "/v1/responses/{id}", INFER, "Forget a response.", self._forget_response),
            Way("POST", "/v1/embeddings", EMBED, "Texts as vectors (OpenAI).", self._embeddings, ("input",)),
            Way("POST", "/api/embed", EMBED, "Texts as vectors (Ollama).", self._embed, ("input",)),
            Way("GET", "/v1/models", INFER, "What can be asked.", self._models),
            Way("GET", "/v1/models/{name:path}", INFER, "One of them.", self._model),
            Way(
                "POST",
                "/v1/messages",
                INFER,
                "Messages (Anthropic, Claude Code).",
                self._ask(read_message),
                ("max_tokens", "messages"),
            ),
            Way("POST", "/v1/messages/count_tokens", INFER, "Tokens of messages (Anthropic).", self._count, asked),
            Way("POST", "/api/chat", INFER, "Chat, as Ollama has it.", self._ollama(ollama.read_chat), asked),
            Way("POST", "/api/generate", INFER, "Answer a prompt (Ollama).", self._ollama(ollama.read_generate)),
            Way("GET", "/api/tags", INFER, "What can be asked (Ollama).", self._tags),
            Way("POST", "/api/show", INFER, "One model in detail (Ollama).", self._show, ("model",)),
            Way("GET", "/api/ps", INFER, "What is loaded (Ollama).", self._ps),
            Way("GET", "/api/version", OPEN, "Which Ollama's routes these are.", self._version),
            Way("GET", "/v1/receipts/{id}", INFER, "Who computed an answer, and how long it took.", self._receipt),
            Way(
                "POST",
                "/v1/feedback",
                FEEDBACK,
                "Whether an answer was right.",
                self._feedback,
                ("answer", "correct"),
            ),
            Way("POST", "/v1/pause", ADMIN, "No background work on this node.", partial(self._order, "pause")),
            Way("POST", "/v1/drain", ADMIN, "The same, and give its layers away.", partial(self._order, "drain")),
            Way("POST", "/v1/resume", ADMIN, "Undo pause and drain.", partial(self._order, "resume")),
            Way("GET", "/healthz", OPEN, "Whether the node is alive.", self._health),
            Way("GET", "/readyz", OPEN, "Whether the mesh answers.", self._ready),
            Way("GET", "/metrics", ADMIN, "Figures for Prometheus.", self._figures, (), "text/plain"),
            Way("GET", "/events", ADMIN, "The status whenever it changes.", self._events, (), "text/event-stream"),
            Way("GET", "/openapi.json", OPEN, "This document.", self._openapi),
            Way("GET", "/page/{name}", OPEN, "A file of the web page.", self._page_file, (), "*/*"),
            Way("GET", "/", OPEN, "The web page; a line of text for programs.", self._root, (), "text/*"),
        )

    # ------------------------------------------------------------ every request

    async def _guarded(self, way: Way, request: Request) -> Response:
        """Keys first; what goes wrong is said in the dialect of the route."""
        request.scope["meshnode.route"] = way.path
        try:
            key = request.scope["meshnode.key"] = self._admit(way, request)
            if way.audited:
                self._door.audit.note("http", who_asks(request, key), f"{way.method} {way.path}")
            return await way.handler(request)
        except ClientDisconnect:
            return GONE
        except Problem as problem:
            return refuse(request.url.path, problem)
        except MeshError as error:
            return refuse(request.url.path, problem_of(error))

    def _admit(self, way: Way, request: Request) -> ApiKey | None:
        try:
            return self._gate.admit(request, way.scope)
        except Problem as problem:
            who = who_asks(request, None)
            self._door.audit.refused("http", who, f"{way.method} {way.path}: {problem.text}")
            raise

    def _ask(self, read: Read) -> Handler:
        return partial(self._answer, read)

    def _ollama(self, read: Read) -> Handler:
        return partial(self._answer_ollama, read)

    async def _answer(self, read: Read, request: Request) -> Response:
        return self._delivery(read, request, await read_json(request))

    def _delivery(self, read: Read, request: Request, body: Json) -> Response:
        chosen = choose(self._door, body.get("model"))
        task = read(body, chosen, self._now_s())
        refused = partial(refuse, request.url.path)
        key: ApiKey | None = request.scope["meshnode.key"]
        trace = request.headers.get("traceparent", "")
        asked = partial(self._questions, key, chosen.model, trace)
        return Delivery(asked, task, refused, partial(self._receipts.keep, task.id))

    async def _questions(
        self, key: ApiKey | None, model: Offered, trace: str, question: Question
    ) -> AsyncGenerator[Event, None]:
        """The events of one question, measured and counted for its key.

        A prompt that was kept for one key is no help to another: time would tell what its owner asked.
        """
        question = replace(question, asker="" if key is None else key.id, traceparent=trace)
        if self._door.audit.keeps_text:
            who = "this device" if key is None else named(key)
            self._door.audit.note("http", who, "question", json.dumps(question.as_json(), default=str))
        door = self._door
        asked = door.ask_upstream(model.name, question) if model.upstream else door.ask(question)
        async with aclosing(self._metrics.measured(asked)) as events:
            try:
                async for event in events:
                    if isinstance(event, Answer):
                        self._gate.spend(key, len(event.prompt_token_ids) + len(event.token_ids))
                    yield event
            except MeshError as error:
                problem = problem_of(error)
                problem.text = self._door.name_peers(problem.text)
                raise problem from error

    def _now_s(self) -> int:
        return self._wall() // 1000

    # ------------------------------------------------------------ the dialects

    async def _models(self, request: Request) -> Response:
        document = anthropic_models if is_anthropic(request) else models_document
        return JsonResponse(document(self._door.models()))

    async def _model(self, request: Request) -> Response:
        model = find(self._door.models(), request.path_params["name"])
        return JsonResponse(anthropic_model(model) if is_anthropic(request) else model_document(model))

    async def _response(self, request: Request) -> Response:
        return JsonResponse(self._history.find(request.path_params["id"]).document)

    async def _forget_response(self, request: Request) -> Response:
        id = request.path_params["id"]
        self._history.find(id)
        self._history.forget(id)
        return JsonResponse({"id": id, "object": "response.deleted", "deleted": True})

    async def _count(self, request: Request) -> Response:
        body = await read_json(request)
        question = question_of_message(body, computed(choose(self._door, body.get("model"))))
        return JsonResponse({"input_tokens": await self._door.count(question)})

    async def _answer_ollama(self, read: Read, request: Request) -> Response:
        body = await read_json(request)
        if ollama.loads_only(body):
            return JsonResponse(ollama.loaded_document(body, choose(self._door, body.get("model")), self._now_s()))
        return self._delivery(read, request, body)

    async def _embeddings(self, request: Request) -> Response:
        body = await read_json(request)
        chosen = computed(choose(self._door, body.get("model")))
        check_size(body, chosen)
        return JsonResponse(openai_document(body, chosen, await self._vectors(request, body, chosen)))

    async def _embed(self, request: Request) -> Response:
        body, began = await read_json(request), monotonic()
        chosen = computed(choose(self._door, body.get("model")))
        made = await self._vectors(request, body, chosen)
        return JsonResponse(ollama_document(chosen, made, int((monotonic() - began) * 1e9)))

    async def _vectors(self, request: Request, body: Json, chosen: Chosen) -> list[Embedding]:
        """One after the other: each passes through all stages. A client that leaves ends them."""
        made: list[Embedding] = []
        texts, failure = texts_of(body), None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, request, nursery.cancel_scope)
            try:
                for text in texts:
                    made.append(await self._door.embed(text, chosen.adapter))
                    self._gate.spend(request.scope["meshnode.key"], len(made[-1].prompt_token_ids))
            except MeshError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if len(made) < len(texts):
            raise ClientDisconnect
        return made

    async def _tags(self, _: Request) -> Response:
        return JsonResponse(tags_document(self._door.models()))

    async def _show(self, request: Request) -> Response:
        body = await read_json(request)
        return JsonResponse(show_document(choose(self._door, body.get("model") or body.get("name")).model))

    async def _ps(self, _: Request) -> Response:
        return JsonResponse(ps_document(self._door.models(), self._now_s()))

    async def _version(self, _: Request) -> Response:
        return JsonResponse(version_document())

    # ------------------------------------------------------------ our own

    async def _figures(self, _: Request) -> Response:
        return Response(self._metrics.text(self._door.status()), headers={"content-type": CONTENT_TYPE})

    async def _events(self, _: Request) -> Response:
        return Events(self._door, self._listeners)

    async def _openapi(self, _: Request) -> Response:
        return JsonResponse(openapi_document(self.ways()))

    async def _page_file(self, request: Request) -> Response:
        return self._page.give(request.path_params["name"], request)

    async def _root(self, request: Request) -> Response:
        if wants_page(request):
            return self._page.give(INDEX, request)
        return PlainTextResponse("meshnode answers here: OpenAI at /v1, Anthropic at /v1/messages, Ollama at /api\n")

    async def _feedback(self, request: Request) -> Response:
        body = await read_json(request)
        answer = body.get("answer")
        if isinstance(answer, str) and not answer.isdigit():
            answer = self._receipts.find(answer)["answers"][0]["answer"]
        judged = self._door.judge(answer, body.get("correct"), body.get("label") or "")
        return JsonResponse({"object": "feedback", **judged.as_json()})

    async def _receipt(self, request: Request) -> Response:
        return JsonResponse(self._receipts.find(request.path_params["id"]))

    async def _order(self, order: str, request: Request) -> Response:
        body = await read_json(request, empty=True)
        return JsonResponse({"object": "duty", **plain(self._door.obey(order, body.get("seconds") or 0))})

    async def _health(self, _: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        ready, sentence = self._door.ready
        return JsonResponse({"ready": ready, "readiness": sentence}, 200 if ready else 503)


def named(key: ApiKey) -> str:
    """A key in the audit log."""
    return f"key {key.name} ({key.id})"


def who_asks(request: Request, key: ApiKey | None) -> str:
    """Whose request it is, for the audit log."""
    if key is not None:
        return named(key)
    return "somebody" if request.client is None else f"a program at {request.client.host}"


async def _cancel_when_gone(request: Request, scope: trio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _bug(request: Request, _: Exception) -> Response:
    """Ours; `border.py` writes it into the log."""
    return refuse(request.url.path, internal())


async def _no_route(request: Request, error: Exception) -> Response:
    """A path or a method that nobody has."""
    path = request.url.path[:80]
    if isinstance(error, HTTPException) and error.status_code == 405:
        return refuse(path, Problem(405, "method_not_allowed", f"{path} can't be asked with {request.method}"))
    return refuse(path, Problem(404, "not_found", f"there is nothing at {path}"))
