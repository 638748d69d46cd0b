"""GET /openapi.json: every route, as OpenAPI 3.1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from meshnode import __version__
from meshnode.http.ways import Way

Json = dict[str, Any]

STREAMS: Final = ("text/event-stream", "application/x-ndjson")
REFUSALS: Final = {
    "400": "a field can't be used, or the prompt is too long",
    "401": "a key is missing or wrong",
    "403": "the key may not do that, or the page that asks may not",
    "404": "there is no such model, answer or path",
    "408": "the body did not come in time",
    "413": "the body is too large",
    "429": "the key has used its limit",
    "503": "the mesh is not ready, or busy; ask again",
}
# What a field that a route needs may be.
KINDS: Final[dict[str, Json]] = {
    "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
    "prompt": {"type": ["string", "array"]},
    "input": {"type": ["string", "array"]},
    "max_tokens": {"type": "integer", "minimum": 1},
    "answer": {"type": "string"},
    "correct": {"type": "boolean"},
    "model": {"type": "string"},
}


def openapi_document(ways: Sequence[Way]) -> Json:
    """The document. Bodies may hold more fields than it names: the dialects' own documents say which."""
    paths: dict[str, Json] = {}
    for way in ways:
        paths.setdefault(way.path.replace(":path}", "}"), {})[way.method.lower()] = _operation(way)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "meshnode",
            "version": __version__,
            "description": "A node of a private mesh, in the dialects of OpenAI, Anthropic and Ollama.",
        },
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(way: Way) -> Json:
    content: Json = {way.gives: {"schema": {"type": "object"} if way.gives == "application/json" else {}}}
    if way.needs and "answer" not in way.needs:
        content |= {kind: {"schema": {}} for kind in STREAMS}
    ok = {"200": {"description": "the answer", "content": content}}
    if way.path == "/readyz":
        ok["503"] = {"description": "not ready", "content": content}
    operation: Json = {
        "summary": way.says,
        "operationId": re.sub(r"[^a-z0-9]+", "_", f"{way.method.lower()}{way.path.lower()}").strip("_"),
        "responses": {**{status: _refusal(text) for status, text in REFUSALS.items()}, **ok},
    }
    if names := re.findall(r"{([a-z]+)(?::path)?}", way.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if way.method == "POST":
        schema = {
            "type": "object",
            "required": list(way.needs),
            "properties": {name: KINDS.get(name, {}) for name in ("model", *way.needs)},
        }
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if way.scope:
        operation["security"] = [{}, {"key": [way.scope]}]
    return operation


def _refusal(text: str) -> Json:
    return {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
