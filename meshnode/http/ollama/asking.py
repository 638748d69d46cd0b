"""POST /api/chat and /api/generate."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Piece, ToolCall
from meshnode.http.body import Json, shown
from meshnode.http.body import field as field_of
from meshnode.http.json_text import to_bytes
from meshnode.http.models import Chosen
from meshnode.http.ollama.fields import (
    MEDIA_TYPE,
    date_of,
    error_document,
    figures_of,
    form_of,
    options_of,
    refuse_what_changes_answers,
)
from meshnode.http.openai.fields import new_id
from meshnode.http.problems import Problem, unsupported, wrong
from meshnode.http.sampling import question_of
from meshnode.text.question import ROLES, Question


def read_chat(body: Json, chosen: Chosen, now_s: int) -> Lines:
    """A request as a task. Raises Problem 400."""
    refuse_what_changes_answers(body)
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise wrong("messages", "messages takes a list of messages")
    asked = {**options_of(body), **form_of(body)}
    asked["messages"] = [_turn(index, turn) for index, turn in enumerate(messages)]
    if tools := field_of(body, "tools", list, []):
        asked["tools"] = tools
    return _lines(body, chosen, now_s, asked, chat=True)


def read_generate(body: Json, chosen: Chosen, now_s: int) -> Lines:
    """A request as a task. Raises Problem 400."""
    refuse_what_changes_answers(body)
    for name in ("suffix", "template", "context"):
        if body.get(name):
            raise unsupported(name, f"{name} can't be used here; leave it out, or use /api/chat")
    prompt = field_of(body, "prompt", str, "")
    asked = {**options_of(body), **form_of(body)}
    if field_of(body, "raw", bool, False):
        asked["prompt"] = prompt
    else:
        system = field_of(body, "system", str, "")
        first = [{"role": "system", "content": system}] if system else []
        asked["messages"] = [*first, {"role": "user", "content": prompt}]
    return _lines(body, chosen, now_s, asked, chat=False)


def loads_only(body: Json) -> bool:
    """Whether the request asks nothing: clients have a model loaded that way. Ours is."""
    return not body.get("messages") and not body.get("prompt")


def loaded_document(body: Json, chosen: Chosen, now_s: int) -> Json:
    """The answer to such a request."""
    empty: Json = {"message": {"role": "assistant", "content": ""}} if "messages" in body else {"response": ""}
    head = {"model": chosen.model.name, "created_at": date_of(now_s)}
    return {**head, **empty, "done": True, "done_reason": "load"}


def _turn(index: int, turn: Any) -> Json:
    told = turn if isinstance(turn, dict) else {}
    role, content = told.get("role"), told.get("content") or ""
    if role not in ROLES or not isinstance(content, str):
        raise wrong(
            "messages", f"messages[{index}] is {shown(turn)}; it takes a role ({', '.join(ROLES)}) and a content"
        )
    if told.get("images"):
        raise unsupported("images", f"messages[{index}] has images; this model reads text alone")
    made: Json = {"role": str(role), "content": content}
    if told.get("tool_calls"):
        made["tool_calls"] = told["tool_calls"]
    if (name := told.get("tool_name") or told.get("name")) is not None:
        made["name"] = name
    return made


def _lines(body: Json, chosen: Chosen, now_s: int, asked: dict[str, Any], *, chat: bool) -> Lines:
    return Lines(
        id=new_id("ollama-"),
        model=chosen.model.name,
        created=now_s,
        questions=(question_of(asked, chosen.adapter, {"num_predict": "max_tokens"}),),
        stream=field_of(body, "stream", bool, True),
        chat=chat,
    )


@dataclass(slots=True, kw_only=True)
class Lines:
    """Implements `task.Task`: one JSON object a line."""

    id: str
    model: str
    created: int
    questions: tuple[Question, ...]
    stream: bool
    chat: bool
    began_ns: int = field(default_factory=time.monotonic_ns)
    media_type: str = MEDIA_TYPE
    ping: bytes = b""

    def document(self, answers: Sequence[Answer]) -> Json:
        """See Task."""
        (answer,) = answers
        return self._line(answer.text, answer.tool_calls, figures_of(answer, time.monotonic_ns() - self.began_ns))

    def feed(self, index: int, event: Event) -> bytes:
        """See Task."""
        match event:
            case Piece(text=text, call=call) if text or call is not None:
                calls = () if call is None else (call,)
                return to_bytes(self._line(text, calls, {"done": False})) + b"\n"
            case _:
                return b""

    def end(self, answers: Sequence[Answer]) -> bytes:
        """See Task."""
        (answer,) = answers
        return to_bytes(self._line("", (), figures_of(answer, time.monotonic_ns() - self.began_ns))) + b"\n"

    def fail(self, problem: Problem) -> bytes:
        """See Task."""
        return to_bytes(error_document(problem)) + b"\n"

    def _line(self, text: str, calls: Sequence[ToolCall], more: Json) -> Json:
        head = {"model": self.model, "created_at": date_of(self.created)}
        if not self.chat:
            return {**head, "response": text, **more}
        message: Json = {"role": "assistant", "content": text}
        if calls:
            functions = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
            message["tool_calls"] = [{"function": function} for function in functions]
        return {**head, "message": message, **more}
