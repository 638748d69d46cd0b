"""POST /v1/completions: the older route, which continues a text as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Likelihood, Piece
from meshnode.http import sse
from meshnode.http.body import Json
from meshnode.http.body import field as field_of
from meshnode.http.door import Offered
from meshnode.http.models import Chosen
from meshnode.http.openai.fields import (
    FINISH,
    MAX_CHOICES,
    choices_of,
    error_document,
    new_id,
    refuse_what_changes_answers,
    spread,
    usage_of,
)
from meshnode.http.openai.tools import form_of, older_document
from meshnode.http.problems import Problem, unsupported, wrong
from meshnode.http.sampling import question_of, sampling_of
from meshnode.text.question import Question

NAMES: Final = {"max_tokens": "max_tokens"}
USUAL_TOKENS: Final = 16  # of this route, when nobody says anything


def read_completion(body: Json, chosen: Chosen, now_s: int) -> Completion:
    """A request as a task. Raises Problem 400."""
    refuse_what_changes_answers(body)
    if body.get("suffix"):
        raise unsupported("suffix", "a text can't be filled in before a suffix here; leave it out")
    asked = {"max_tokens": USUAL_TOKENS, **sampling_of(body, NAMES)}
    asked |= form_of(field_of(body, "response_format", dict, {}), "response_format")
    if (likely := field_of(body, "logprobs", int)) is not None:
        asked["logprobs"] = likely
    prompts = _prompts(body.get("prompt"))
    each = choices_of(body)
    if each * len(prompts) > MAX_CHOICES:
        raise wrong("prompt", f"{len(prompts)} prompts with {each} answers each; {MAX_CHOICES} answers are possible")
    questions: list[Question] = []
    for prompt in prompts:
        questions += spread(question_of({**asked, **prompt}, chosen.adapter), each)
    options = field_of(body, "stream_options", dict, {})
    return Completion(
        id=new_id("cmpl-"),
        created=now_s,
        model=chosen.model,
        questions=tuple(questions),
        each=each,
        echo=field_of(body, "echo", bool, False),
        stream=field_of(body, "stream", bool, False),
        usage=field_of(options, "include_usage", bool, False, at="stream_options."),
    )


def _prompts(prompt: Any) -> list[Json]:
    """A text, a list of texts, token ids, or a list of those."""
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if (isinstance(prompt, list) and prompt and len(prompt) <= MAX_CHOICES) or _tokens(prompt):
        if _tokens(prompt):
            return [{"token_ids": prompt}]
        if all(isinstance(part, str) for part in prompt):
            return [{"prompt": part} for part in prompt]
        if all(_tokens(part) for part in prompt):
            return [{"token_ids": part} for part in prompt]
    raise wrong("prompt", f"prompt takes a text, token ids, or a list of up to {MAX_CHOICES} of either")


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, int) for part in value)


@dataclass(slots=True, kw_only=True)
class Completion:
    """Implements `task.Task`."""

    id: str
    created: int
    model: Offered
    questions: tuple[Question, ...]
    each: int  # answers to one prompt
    echo: bool  # whether the answer begins with the prompt
    stream: bool
    usage: bool
    media_type: str = sse.MEDIA_TYPE
    ping: bytes = sse.PING

    def document(self, answers: Sequence[Answer]) -> Json:
        """See Task."""
        choices = [
            self._choice(index, self._echoed(index) + answer.text, FINISH[answer.reason], answer.logprobs)
            for index, answer in enumerate(answers)
        ]
        return {**self._head(), "choices": choices, "usage": self._usage(answers)}

    def feed(self, index: int, event: Event) -> bytes:
        """See Task."""
        match event:
            case Piece(text=text, likelihood=likelihood) if text or likelihood is not None:
                return self._chunk(self._choice(index, text, None, () if likelihood is None else (likelihood,)))
            case Answer(reason=reason):
                return self._chunk(self._choice(index, "", FINISH[reason]))
            case _:
                return b""

    def _usage(self, answers: Sequence[Answer]) -> Json:
        """Every prompt counts once, however many answers it has."""
        first = answers[:: self.each]
        used = usage_of(answers)
        used["prompt_tokens"] = sum(len(answer.prompt_token_ids) for answer in first)
        used["prompt_tokens_details"]["cached_tokens"] = sum(answer.receipt.cached_tokens for answer in first)
        used["total_tokens"] = used["prompt_tokens"] + used["completion_tokens"]
        return used

    def _echoed(self, index: int) -> str:
        return self.questions[index].prompt or "" if self.echo else ""

    def _choice(self, index: int, text: str, finish: str | None, likely: Sequence[Likelihood] = ()) -> Json:
        return {"text": text, "index": index, "logprobs": older_document(likely), "finish_reason": finish}

    def _chunk(self, choice: Json) -> bytes:
        used = {"usage": None} if self.usage else {}
        return sse.event({**self._head(), "choices": [choice], **used})

    def end(self, answers: Sequence[Answer]) -> bytes:
        """See Task."""
        done = b"data: [DONE]\n\n"
        return (
            sse.event({**self._head(), "choices": [], "usage": self._usage(answers)}) + done if self.usage else done
        )

    def fail(self, problem: Problem) -> bytes:
        """See Task."""
        return sse.event(error_document(problem)) + b"data: [DONE]\n\n"

    def _head(self) -> Json:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": f"fp_{self.model.manifest[-12:]}",
        }
