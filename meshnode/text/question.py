"""A question, read and checked once: by the command line, by the library, and by the node that answers it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict

from meshnode.core.errors import BadRequest, Declined
from meshnode.core.tracing import read_traceparent
from meshnode.text.forms import JSON_OBJECT, JSON_SCHEMA, LARK, REGEX
from meshnode.text.tools import AUTO, NONE, Tool, read_choice, read_tools
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, cid_codec

MAX_CHARACTERS: Final = 1 << 20  # of a prompt or a conversation: far above any context
MAX_TURNS: Final = 1024
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_TOKEN_ID: Final = (1 << 24) - 1
MAX_SHOWN: Final = 40  # characters of a wrong value
NO_ADAPTER: Final = "none"  # the bare model answers
MAX_FORM_BYTES: Final = 1 << 16  # of a schema or a grammar
# kind of a form, as protocols/pipe has it -> its field in a request
FORMS: Final[Mapping[str, str]] = {
    JSON_SCHEMA: "json_schema",
    JSON_OBJECT: "json_object",
    REGEX: "regex",
    LARK: "grammar",
}
ROLES: Final = ("assistant", "system", "tool", "user")

# What each number may be: (lowest, highest), as protocols/pipe has them.
RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "max_tokens": (1, 1 << 20),
    "temperature": (0, 10),
    "top_p": (0.000001, 1),
    "top_k": (0, 1 << 20),
    "min_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, 20),
    "seed": (0, (1 << 63) - 1),
}
_WHOLE: Final = frozenset({"max_tokens", "top_k", "seed", "logprobs"})

Turn = Mapping[str, Any]  # {"role": ..., "content": ...}; with "tool_calls", or "tool_call_id" and "name"
Prompt = str | Sequence[Turn] | Sequence[int]


class Options(TypedDict, total=False):
    """How a question is answered; the names are those of the OpenAI API."""

    max_tokens: int  # longest answer; 512
    temperature: float  # 0 is greedy: always the most likely token; 0.7
    top_p: float  # of the most likely tokens, those that make up this share; 0.9, 1 is off
    top_k: int  # of the most likely tokens, this many; 0, which is off
    min_p: float  # of the tokens at least this likely, beside the most likely one; 0, which is off
    repetition_penalty: float  # above 1: tokens that were there become less likely; 1, which is off
    presence_penalty: float  # above 0: tokens of the answer become less likely; 0, which is off
    frequency_penalty: float  # the same for each time that they are in the answer; 0, which is off
    logprobs: int | None  # tell how likely each token was, and so many of the most likely ones; None: don't
    seed: int | None  # the same seed gives the same answer; drawn by the node
    stop: Sequence[str]  # the answer ends before any of these texts
    json_schema: str | Mapping[str, Any]  # the answer is a JSON text of this schema
    json_object: bool  # the answer is a JSON object
    regex: str  # the answer matches this regular expression (the syntax is that of Rust's regex)
    grammar: str  # the answer follows this grammar in Lark's language, from `start` on
    tools: Sequence[Tool]  # that the answer may call, as the OpenAI API has them
    tool_choice: str  # "auto", "none", "required", or the name of the one that is to be called; auto
    adapter: str  # what was learned that answers: a CID, or "none" for the bare model; the released one
    traceparent: str  # the span of a trace that the answer belongs to, as W3C Trace Context has it
    raw: bool  # a text is continued as it stands, without the model's chat template


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: exactly one of `prompt` (continued as it stands), `messages` (chat) and `token_ids`."""

    prompt: str | None = None
    messages: tuple[Turn, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None  # 0: of the token alone
    seed: int | None = None
    stop: tuple[str, ...] = ()
    form: tuple[str, str] | None = None  # of the answer: its kind, as protocols/pipe has it, and the text of it
    tools: tuple[Tool, ...] = ()
    tool_choice: str = AUTO
    adapter: str | None = None  # None: the one that is released; "none"; or the CID of one
    traceparent: str = ""  # W3C Trace Context; empty: none
    asker: str = ""  # for whom the node asks, by its own word; no part of a request

    def as_json(self) -> dict[str, Any]:
        """As it is sent to a node."""
        document = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "asker" and (field.name != "traceparent" or self.traceparent)
            if (value := getattr(self, field.name)) is not None
        }
        if (form := document.pop("form", None)) is not None:
            kind, text = form
            document |= {"json_object": True} if kind == JSON_OBJECT else {FORMS[kind]: text}
        return document


def question(prompt: Prompt, options: Mapping[str, Any] = {}) -> Question:
    """A question as people put it.

    Args:
      prompt: a text, which becomes the user's turn of a chat unless `raw` is set; or chat messages; or token ids.
      options: see `Options`.

    Raises BadRequest with a sentence about the first thing that is wrong; Declined `too-long`.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        known = ", ".join(Options.__annotations__)
        raise BadRequest(f"there is no option {min(unknown)}; options are {known}")
    asked: dict[str, Any] = dict(options)
    raw = asked.pop("raw", False)
    if isinstance(prompt, str):
        _check_prompt(prompt)
        asked |= {"prompt": prompt} if raw else {"messages": [{"role": "user", "content": prompt}]}
    elif not isinstance(prompt, (list, tuple)):
        raise BadRequest(
            f"a prompt is a text, a list of messages or a list of token ids, and no {type(prompt).__name__}"
        )
    elif any(isinstance(part, int) for part in prompt):
        asked["token_ids"] = list(prompt)
    else:
        asked["messages"] = list(prompt)
    return read_question(asked)


def read_question(request: Mapping[str, Any]) -> Question:
    """A question out of a request in plain data; keys that are no field of Question are ignored.

    Raises BadRequest with a sentence about the first thing that is wrong; Declined `too-long`.
    """
    given = [name for name in ("prompt", "messages", "token_ids") if request.get(name) is not None]
    if len(given) != 1:
        raise BadRequest("a question has either a prompt, or messages, or token_ids, and only one of them")
    found: dict[str, Any] = {name: _number(request, name) for name in RANGES if request.get(name) is not None}
    match given[0]:
        case "prompt":
            found["prompt"] = _check_prompt(request["prompt"])
        case "messages":
            found["messages"] = _messages(request["messages"])
        case _:
            found["token_ids"] = _token_ids(request["token_ids"])
    if request.get("stop") is not None:
        found["stop"] = _stops(request["stop"])
    found["form"] = _form(request)
    if request.get("tools") is not None:
        found["tools"] = read_tools(request["tools"])
    if request.get("tool_choice") is not None:
        found["tool_choice"] = read_choice(request["tool_choice"], found.get("tools", ()))
    if found.get("tools") and given[0] != "messages":
        raise BadRequest("tools are for chats: ask with messages")
    if found["form"] is not None and found.get("tool_choice", AUTO) not in (AUTO, NONE):
        raise BadRequest("an answer that has to call a tool takes no other form")
    if request.get("adapter") is not None:
        found["adapter"] = _adapter(request["adapter"])
    if request.get("traceparent"):
        found["traceparent"] = _traceparent(request["traceparent"])
    return Question(**found)


def _traceparent(given: Any) -> str:
    if not isinstance(given, str) or read_traceparent(given) is None:
        raise BadRequest(
            f"traceparent is {repr(given)[:MAX_SHOWN]}; it takes 00-TRACE-SPAN-01, with 32 and 16 hexadecimal digits"
        )
    return given


def _number(request: Mapping[str, Any], name: str) -> float:
    value, (low, high) = request[name], RANGES[name]
    whole = name in _WHOLE
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
        kind = "whole number" if whole else "number"
        shown = f"{value:g}" if isinstance(value, float) and not whole else repr(value)[:MAX_SHOWN]
        raise BadRequest(f"{name} is {shown}; it takes a {kind} from {low} to {high}")
    return value


def _check_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise BadRequest("prompt is a text")
    if not prompt:
        raise BadRequest("the prompt is empty")
    if len(prompt) > MAX_CHARACTERS:
        raise Declined("too-long", f"the prompt has {len(prompt)} characters; {MAX_CHARACTERS} are possible")
    return _whole(prompt)


def _messages(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, (list, tuple)) or not 1 <= len(messages) <= MAX_TURNS:
        raise BadRequest(f"messages is a list of 1 to {MAX_TURNS} messages, each a role and a content")
    turns: list[dict[str, Any]] = []
    for message in messages:
        told = message if isinstance(message, Mapping) else {}
        role, content = told.get("role"), told.get("content")
        if told.get("tool_calls"):
            content = content or ""
        if role not in ROLES or not isinstance(content, str):
            raise BadRequest(f"a message has a role ({', '.join(ROLES)}) and a content in text")
        _whole(content)
        turn = {"role": role, "content": content}
        for name in ("name", "tool_call_id"):
            if told.get(name) is not None:
                if not isinstance(told[name], str):
                    raise BadRequest(f"{name} of a message is a text")
                turn[name] = _whole(told[name])
        if told.get("tool_calls"):
            turn["tool_calls"] = _calls(told["tool_calls"])
        turns.append(turn)
    if sum(len(json.dumps(turn)) for turn in turns) > 2 * MAX_CHARACTERS or (
        sum(len(turn["content"]) for turn in turns) > MAX_CHARACTERS
    ):
        raise Declined("too-long", f"the conversation has more than {MAX_CHARACTERS} characters")
    return tuple(turns)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """What an answer before called, with arguments as an object, as templates take them. Raises BadRequest."""
    made = []
    for call in calls if isinstance(calls, (list, tuple)) else [None]:
        call = call if isinstance(call, Mapping) else {}
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest("tool_calls is a list of calls, each a function with a name and arguments")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, Mapping):
            raise BadRequest(f"the arguments of a call of {function['name'][:MAX_SHOWN]} are no JSON object")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def _token_ids(tokens: Any) -> tuple[int, ...]:
    if not isinstance(tokens, (list, tuple)) or not tokens:
        raise BadRequest("token_ids is a list of whole numbers, and not an empty one")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_TOKEN_ID:
            raise BadRequest(f"{repr(token)[:MAX_SHOWN]} is not a token id; they go from 0 to {MAX_TOKEN_ID}")
    return tuple(tokens)


def _stops(stops: Any) -> tuple[str, ...]:
    texts = [stops] if isinstance(stops, str) else stops
    if (
        not isinstance(texts, (list, tuple))
        or len(texts) > MAX_STOPS
        or not all(isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS for text in texts)
    ):
        raise BadRequest(f"stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(_whole(text) for text in texts)


def _form(request: Mapping[str, Any]) -> tuple[str, str] | None:
    """Of the answer. Raises BadRequest."""
    given = [(kind, name) for kind, name in FORMS.items() if request.get(name) is not None]
    given = [(kind, name) for kind, name in given if (kind, request[name]) != (JSON_OBJECT, False)]
    if not given:
        return None
    if len(given) > 1:
        raise BadRequest(f"an answer takes one form, and not {' and '.join(name for _, name in given)}")
    kind, name = given[0]
    value = request[name]
    if kind == JSON_OBJECT:
        if value is not True:
            raise BadRequest("json_object is true or false")
        return kind, ""
    if kind == JSON_SCHEMA and isinstance(value, Mapping):
        value = _json(value)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name} is a text{' or an object' if kind == 'json_schema' else ''}, and not an empty one")
    if len(_whole(value).encode()) > MAX_FORM_BYTES:
        raise BadRequest(f"{name} has more than {MAX_FORM_BYTES} bytes")
    return kind, value


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"json_schema can't be written as JSON: {error}") from error


def _adapter(name: Any) -> str:
    try:
        if isinstance(name, str) and (name == NO_ADAPTER or cid_codec(name) == DAG_CBOR):
            return name
    except RemoteProtocolError:
        pass
    shown = repr(name)[:MAX_SHOWN]
    raise BadRequest(f"adapter is {shown}; it takes the CID of an adapter, which begins with bafyrei, or none")


def _whole(text: str) -> str:
    """JSON can spell half a surrogate pair, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"character {error.start} of a text is no character: it was not UTF-8, or is half of a pair"
        ) from error
    return text
