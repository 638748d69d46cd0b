"""Tools, forms and likelihoods, as OpenAI's routes have them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from meshnode.api.messages import Likelihood, Likely, ToolCall
from meshnode.http.body import Json, field, shown
from meshnode.http.problems import unsupported, wrong


def tools_of(body: Json) -> Json:
    """`tools` and `tool_choice` as fields of a question. Raises Problem 400."""
    tools = field(body, "tools", list, [])
    return choice_of(body, tools) if tools else {}


def choice_of(body: Json, tools: list[Any]) -> Json:
    """The same with tools that are read already."""
    choice = field(body, "tool_choice", (str, dict))
    if isinstance(choice, dict) and "function" not in choice:  # as /v1/responses names one
        choice = {"function": {"name": choice.get("name")}}
    return {"tools": tools} if choice is None else {"tools": tools, "tool_choice": choice}


def form_of(form: Json, at: str) -> Json:
    """The form of an answer as a field of a question. Raises Problem 400."""
    match form.get("type", "text"):
        case "text":
            return {}
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            inside = field(form, "json_schema", dict, form, at=f"{at}.")
            schema = inside.get("schema")
            if not isinstance(schema, dict):
                raise wrong(at, f"{at}: the schema is {shown(schema)}; it takes a JSON schema")
            return {"json_schema": schema}
        case kind:
            raise unsupported(at, f"{at}.type is {shown(kind)}; it takes text, json_object or json_schema")


def chances_of(body: Json) -> Json:
    """`logprobs` and `top_logprobs` as a field of a question. Raises Problem 400."""
    if not field(body, "logprobs", bool, False):
        return {}
    return {"logprobs": field(body, "top_logprobs", int, 0)}


def new_call_id() -> str:
    """Nobody can guess it, and no two are alike."""
    return f"call_{secrets.token_hex(12)}"


def call_document(call: ToolCall) -> Json:
    """A call, as chats have it."""
    return {"id": new_call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def likelihoods_document(likely: Sequence[Likelihood]) -> Json | None:
    """How likely the tokens of an answer were, as chats have it."""
    if not likely:
        return None
    content = [{**_likely(one), "top_logprobs": [_likely(other) for other in one.top]} for one in likely]
    return {"content": content, "refusal": None}


def older_document(likely: Sequence[Likelihood]) -> Json | None:
    """The same for /v1/completions."""
    if not likely:
        return None
    texts = [text_of(one) for one in likely]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in likely],
        "top_logprobs": [{text_of(other): other.logprob for other in one.top} for one in likely],
        "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
    }


def text_of(one: Likely) -> str:
    """A token's own text; of a part of a character what can be shown of it."""
    return bytes(one.bytes).decode("utf-8", "replace")


def _likely(one: Likely) -> Json:
    return {"token": text_of(one), "logprob": one.logprob, "bytes": list(one.bytes)}
