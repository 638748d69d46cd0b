"""POST /v1/messages and /v1/messages/count_tokens, which Claude Code and the Anthropic SDKs speak."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Piece
from meshnode.http import sse
from meshnode.http.anthropic.errors import error_document
from meshnode.http.anthropic.turns import tools_of, turns_of
from meshnode.http.body import Json
from meshnode.http.body import field as field_of
from meshnode.http.models import Chosen
from meshnode.http.openai.fields import new_id
from meshnode.http.openai.tools import form_of, new_call_id
from meshnode.http.problems import Problem, wrong
from meshnode.http.sampling import question_of, sampling_of
from meshnode.services.inference.text import Started
from meshnode.text.question import Question

STOP: Final = {"eos": "end_turn", "stop": "stop_sequence", "length": "max_tokens", "tool_calls": "tool_use"}


def read_message(body: Json, chosen: Chosen, now_s: int) -> Message:
    """A request as a task. Raises Problem 400."""
    del now_s  # the dialect has no dates
    if field_of(body, "max_tokens", int) is None:
        raise wrong("max_tokens", "max_tokens: Field required")
    return Message(
        id=new_id("msg_"),
        model=chosen.model.name,
        questions=(question_of_message(body, chosen),),
        stream=field_of(body, "stream", bool, False),
    )


def question_of_message(body: Json, chosen: Chosen) -> Question:
    """What is asked. Raises Problem 400."""
    asked = sampling_of({**body, "stop": field_of(body, "stop_sequences", list, [])}, {"max_tokens": "max_tokens"})
    asked |= {**tools_of(body), **_form(body), "messages": turns_of(body)}
    return question_of(asked, chosen.adapter, {"stop_sequences": "stop"})


def _form(body: Json) -> Json:
    """`output_config.format` (`output_format` before), which has a JSON schema."""
    config = field_of(body, "output_config", dict, {})
    form = config.get("format") or body.get("output_format")
    return form_of(form, "output_config.format") if isinstance(form, dict) else {}


@dataclass(slots=True, kw_only=True)
class Message:
    """Implements `task.Task`."""

    id: str
    model: str
    questions: tuple[Question, ...]
    stream: bool
    block: int = 0  # number of the one that is open
    open: bool = False
    media_type: str = sse.MEDIA_TYPE
    ping: bytes = sse.event({"type": "ping"}, "ping")

    def document(self, answers: Sequence[Answer]) -> Json:
        """See Task."""
        (answer,) = answers
        return {
            **self._head(_content(answer)),
            **_ending(answer),
            "usage": _used(answer),
        }

    def feed(self, index: int, event: Event) -> bytes:
        """See Task."""
        match event:
            case Started(prompt, cached):
                head = {**self._head([]), "stop_reason": None, "stop_sequence": None}
                return _event("message_start", message={**head, "usage": _usage(prompt, cached, 0)}) + self.ping
            case Piece(call=call) if call is not None:
                block = {"type": "tool_use", "id": f"toolu_{new_call_id()}", "name": call.name, "input": {}}
                delta = {"type": "input_json_delta", "partial_json": call.arguments}
                return self._close() + self._open(block) + self._delta(delta) + self._close()
            case Piece(text=text) if text:
                begun = b"" if self.open else self._open({"type": "text", "text": ""})
                return begun + self._delta({"type": "text_delta", "text": text})
            case _:
                return b""

    def _open(self, block: Json) -> bytes:
        self.open = True
        return _event("content_block_start", index=self.block, content_block=block)

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=self.block, delta=delta)

    def _close(self) -> bytes:
        if not self.open:
            return b""
        self.open = False
        self.block += 1
        return _event("content_block_stop", index=self.block - 1)

    def end(self, answers: Sequence[Answer]) -> bytes:
        """See Task."""
        (answer,) = answers
        used = _event("message_delta", delta=_ending(answer), usage=_used(answer))
        return self._close() + used + _event("message_stop")

    def fail(self, problem: Problem) -> bytes:
        """See Task."""
        return sse.event(error_document(problem), "error")

    def _head(self, content: list[Json]) -> Json:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}


def _event(kind: str, **fields: Any) -> bytes:
    return sse.event({"type": kind, **fields}, kind)


def _content(answer: Answer) -> list[Json]:
    """The text, unless there are calls alone, and the calls."""
    texts = [{"type": "text", "text": answer.text}] if answer.text or not answer.tool_calls else []
    calls = [
        {
            "type": "tool_use",
            "id": f"toolu_{new_call_id()}",
            "name": call.name,
            "input": json.loads(call.arguments),
        }
        for call in answer.tool_calls
    ]
    return [*texts, *calls]


def _ending(answer: Answer) -> Json:
    return {"stop_reason": STOP[answer.reason], "stop_sequence": answer.stopped_by or None}


def _used(answer: Answer) -> Json:
    return _usage(len(answer.prompt_token_ids), answer.receipt.cached_tokens, len(answer.token_ids))


def _usage(prompt: int, cached: int, completion: int) -> Json:
    """The three kinds of input tokens add up to the prompt."""
    return {
        "input_tokens": prompt - cached,
        "output_tokens": completion,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }
