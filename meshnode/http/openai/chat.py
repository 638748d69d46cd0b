"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Piece
from meshnode.http import sse
from meshnode.http.body import Json, shown
from meshnode.http.body import field as field_of
from meshnode.http.door import Offered
from meshnode.http.models import Chosen
from meshnode.http.openai.fields import (
    FINISH,
    choices_of,
    error_document,
    new_id,
    refuse_what_changes_answers,
    spread,
    text_of,
    usage_of,
)
from meshnode.http.openai.tools import call_document, chances_of, form_of, likelihoods_document, tools_of
from meshnode.http.problems import Problem, wrong
from meshnode.http.sampling import question_of, sampling_of
from meshnode.services.inference.text import Started
from meshnode.text.question import Question

NAMES: Final = {"max_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
CARRIED: Final = ("tool_calls", "tool_call_id", "name")
ROLES: Final = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def read_chat(body: Json, chosen: Chosen, now_s: int) -> Chat:
    """A request as a task. Raises Problem 400."""
    refuse_what_changes_answers(body)
    asked = sampling_of(body, NAMES)
    names = {"max_completion_tokens": "max_tokens"} if "max_completion_tokens" in body else {}
    asked |= tools_of(body) | chances_of(body)
    asked |= form_of(field_of(body, "response_format", dict, {}), "response_format")
    question = question_of({**asked, "messages": turns_of(body.get("messages"))}, chosen.adapter, names)
    options = field_of(body, "stream_options", dict, {})
    return Chat(
        id=new_id("chatcmpl-"),
        created=now_s,
        model=chosen.model,
        questions=spread(question, choices_of(body)),
        stream=field_of(body, "stream", bool, False),
        usage=field_of(options, "include_usage", bool, False, at="stream_options."),
    )


def turns_of(messages: Any) -> list[Json]:
    """Messages as questions have them. Raises Problem 400."""
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "messages takes a list of messages, and not an empty one")
    turns = []
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if not isinstance(message, dict):
            raise wrong(at, f"{at} is {shown(message)}; it takes an object")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise wrong(f"{at}.role", f"{at}.role is {shown(role)}; it takes one of {', '.join(ROLES)}")
        turn: Json = {"role": ROLES[role], "content": text_of(message.get("content"), f"{at}.content")}
        turns.append(turn | {name: message[name] for name in CARRIED if message.get(name) is not None})
    return turns


@dataclass(slots=True, kw_only=True)
class Chat:
    """Implements `task.Task`."""

    id: str
    created: int
    model: Offered
    questions: tuple[Question, ...]
    stream: bool
    usage: bool  # whether a stream ends with what was used
    begun: set[int] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)  # of tools, by choice
    media_type: str = sse.MEDIA_TYPE
    ping: bytes = sse.PING

    def document(self, answers: Sequence[Answer]) -> Json:
        """See Task."""
        choices: list[Json] = [
            {
                "index": index,
                "message": _message(answer),
                "logprobs": likelihoods_document(answer.logprobs),
                "finish_reason": FINISH[answer.reason],
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage_of(answers)}

    def feed(self, index: int, event: Event) -> bytes:
        """See Task."""
        match event:
            case Started():
                return self._begin(index)
            case Piece(call=call) if call is not None:
                number = self.calls.get(index, 0)
                self.calls[index] = number + 1
                delta = {"tool_calls": [{"index": number, **call_document(call)}]}
                return self._begin(index) + self._chunk(index, delta)
            case Piece(text=text, likelihood=likelihood) if text or likelihood is not None:
                likely = likelihoods_document(() if likelihood is None else (likelihood,))
                return self._begin(index) + self._chunk(index, {"content": text}, likely=likely)
            case Answer(reason=reason):
                return self._begin(index) + self._chunk(index, {}, FINISH[reason])
            case _:
                return b""

    def _begin(self, index: int) -> bytes:
        if index in self.begun:
            return b""
        self.begun.add(index)
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def _chunk(self, index: int, delta: Json, finish: str | None = None, likely: Json | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": likely, "finish_reason": finish}
        used = {"usage": None} if self.usage else {}
        return sse.event({**self._head("chat.completion.chunk"), "choices": [choice], **used})

    def end(self, answers: Sequence[Answer]) -> bytes:
        """See Task."""
        done = b"data: [DONE]\n\n"
        if not self.usage:
            return done
        return sse.event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(answers)}) + done

    def fail(self, problem: Problem) -> bytes:
        """See Task."""
        return sse.event(error_document(problem)) + b"data: [DONE]\n\n"

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": f"fp_{self.model.manifest[-12:]}",
            "service_tier": "default",
        }


def _message(answer: Answer) -> Json:
    message: Json = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
    if answer.tool_calls:
        message["tool_calls"] = [call_document(call) for call in answer.tool_calls]
        message["content"] = answer.text or None
    return message
