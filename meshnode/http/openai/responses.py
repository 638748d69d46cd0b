"""POST /v1/responses, which Codex speaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Piece, ToolCall
from meshnode.http import sse
from meshnode.http.body import Json, shown
from meshnode.http.body import field as field_of
from meshnode.http.models import Chosen
from meshnode.http.openai.chat import ROLES
from meshnode.http.openai.fields import new_id, text_of
from meshnode.http.openai.history import History, Past
from meshnode.http.openai.tools import choice_of, form_of, new_call_id
from meshnode.http.problems import Problem, unsupported, wrong
from meshnode.http.sampling import question_of, sampling_of
from meshnode.services.inference.text import Started
from meshnode.text.question import Question

NAMES: Final = {"max_output_tokens": "max_tokens"}
SKIPPED: Final = ("reasoning", "item_reference")  # items that hold no text for the model


def read_response(history: History, body: Json, chosen: Chosen, now_s: int) -> ResponseTask:
    """A request as a task. Raises Problem 400, and 404 for an unknown `previous_response_id`."""
    _refuse(body)
    turns = _turns(body.get("input"))
    previous = field_of(body, "previous_response_id", str)
    before = history.find(previous, param="previous_response_id").turns if previous else ()
    instructions = field_of(body, "instructions", str)
    first = [{"role": "system", "content": instructions}] if instructions else []
    asked = {**sampling_of(body, NAMES), **_tools(body), "messages": [*first, *before, *turns]}
    asked |= form_of(field_of(field_of(body, "text", dict, {}), "format", dict, {}, at="text."), "text.format")
    echoed = {name: body.get(name) for name in ("instructions", "previous_response_id", "max_output_tokens")}
    return ResponseTask(
        id=new_id("resp_"),
        message_id=new_id("msg_"),
        created=now_s,
        model=chosen.model.name,
        questions=(question_of(asked, chosen.adapter, {"max_output_tokens": "max_tokens", "input": "messages"}),),
        stream=field_of(body, "stream", bool, False),
        turns=(*before, *turns),
        history=history if field_of(body, "store", bool, True) else None,
        echoed={**echoed, "metadata": field_of(body, "metadata", dict, {})},
    )


def _refuse(body: Json) -> None:
    """What would change the answer and can't be had."""
    if field_of(body, "background", bool, False):
        raise unsupported("background", "answers can't be computed in the background here. Leave background out")


def _tools(body: Json) -> Json:
    """Functions as chats have them. Kinds of tools that nobody knows are passed over, as Codex expects."""
    tools = []
    for tool in field_of(body, "tools", list, []):
        if isinstance(tool, dict) and tool.get("type") == "function":
            kept = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
            tools.append({"type": "function", "function": kept})
    return choice_of(body, tools) if tools else {}


def _turns(given: Any) -> list[Json]:
    """The input as turns. Raises Problem 400."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise wrong("input", "input takes a text or a list of items, and not an empty one")
    turns: list[Json] = []
    for index, item in enumerate(given):
        at = f"input[{index}]"
        if not isinstance(item, dict):
            raise wrong(at, f"{at} is {shown(item)}; it takes an object")
        kind = item.get("type", "message")
        if kind in SKIPPED:
            continue
        if kind in ("function_call", "function_call_output"):
            turns.append(_called(item, kind))
            continue
        if kind != "message":
            raise unsupported(at, f"{at} is of type {shown(kind)}; this model reads messages alone")
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise wrong(f"{at}.role", f"{at}.role is {shown(role)}; it takes one of {', '.join(ROLES)}")
        turns.append({"role": ROLES[role], "content": text_of(item.get("content"), f"{at}.content")})
    if not turns:
        raise wrong("input", "input holds no message")
    return turns


def _called(item: Json, kind: str) -> Json:
    """A call of a tool, or what it gave, as a turn."""
    id = item.get("call_id")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": id, "type": "function", "function": function}],
        }
    return {"role": "tool", "content": text_of(item.get("output"), "input.output"), "tool_call_id": id}


@dataclass(slots=True, kw_only=True)
class ResponseTask:
    """Implements `task.Task`."""

    id: str
    message_id: str
    created: int
    model: str
    questions: tuple[Question, ...]
    stream: bool
    turns: tuple[Json, ...]  # without instructions, which hold for one request
    history: History | None  # None: the answer is not to be kept
    echoed: Json  # fields of the request that stand in the answer
    begun: bool = False
    number: int = 0  # of the next event
    said: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)  # of tools, told at the end
    media_type: str = sse.MEDIA_TYPE
    ping: bytes = sse.PING

    def document(self, answers: Sequence[Answer]) -> Json:
        """See Task."""
        (answer,) = answers
        cut = answer.reason == "length"
        status = "incomplete" if cut else "completed"
        prompt, completion = len(answer.prompt_token_ids), len(answer.token_ids)
        document = {
            **self._head(status),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output(answer, status),
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": answer.receipt.cached_tokens},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
        }
        if self.history is not None:
            said: Json = {"role": "assistant", "content": answer.text}
            if calls := [item for item in document["output"] if item["type"] == "function_call"]:
                said["tool_calls"] = _called_again(calls)
            self.history.keep(self.id, Past((*self.turns, said), document))
        return document

    def feed(self, index: int, event: Event) -> bytes:
        """See Task."""
        match event:
            case Started():
                return self._begin()
            case Piece(call=call) if call is not None:
                self.calls.append(_call_item(call))
                return b""
            case Piece(text=text) if text:
                self.said.append(text)
                return self._begin() + self._event(
                    "response.output_text.delta", **self._place(), delta=text, logprobs=[]
                )
            case _:
                return b""

    def end(self, answers: Sequence[Answer]) -> bytes:
        """See Task."""
        document = self.document(answers)
        text, status = "".join(self.said), document["status"]
        sent = self._begin()
        if text or not self.calls:
            sent += self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            sent += self._event("response.content_part.done", **self._place(), part=_part(text))
        sent += self._event("response.output_item.done", output_index=0, item=self._item(text, status))
        for index, item in enumerate(self.calls, 1):
            place = {"item_id": item["id"], "output_index": index}
            begun = {**item, "arguments": "", "status": "in_progress"}
            arguments = item["arguments"]
            sent += self._event("response.output_item.added", output_index=index, item=begun)
            sent += self._event("response.function_call_arguments.delta", **place, delta=arguments)
            sent += self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=arguments
            )
            sent += self._event("response.output_item.done", output_index=index, item=item)
        return sent + self._event(f"response.{status}", response=document)

    def fail(self, problem: Problem) -> bytes:
        """See Task."""
        error = {"code": problem.code, "message": problem.text}
        return self._event("response.failed", response={**self._head("failed"), "error": error, "output": []})

    def _output(self, answer: Answer, status: str) -> list[Json]:
        """The message, which a stream has begun with, and calls."""
        calls = self.calls or [_call_item(call) for call in answer.tool_calls]
        message = [self._item(answer.text, status)] if self.stream or answer.text or not calls else []
        return [*message, *calls]

    def _begin(self) -> bytes:
        if self.begun:
            return b""
        self.begun = True
        head = {**self._head("in_progress"), "output": [], "usage": None}
        return (
            self._event("response.created", response=head)
            + self._event("response.in_progress", response=head)
            + self._event("response.output_item.added", output_index=0, item=self._item(None, "in_progress"))
            + self._event("response.content_part.added", **self._place(), part=_part(""))
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return sse.event({"type": kind, "sequence_number": self.number - 1, **fields}, kind)

    def _place(self) -> Json:
        return {"item_id": self.message_id, "output_index": 0, "content_index": 0}

    def _item(self, text: str | None, status: str) -> Json:
        content = [] if text is None else [_part(text)]
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _head(self, status: str) -> Json:
        (question,) = self.questions
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "parallel_tool_calls": True,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
            "store": self.history is not None,
            **self.echoed,
        }


def _call_item(call: ToolCall) -> Json:
    return {
        "type": "function_call",
        "id": new_id("fc_"),
        "call_id": new_call_id(),
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _called_again(items: Sequence[Json]) -> list[Json]:
    """Calls of an answer, as the next request's turn has them."""
    return [call for item in items for call in _called(item, "function_call")["tool_calls"]]


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
