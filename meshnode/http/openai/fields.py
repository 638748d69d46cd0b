"""What OpenAI's routes have in common: fields that change the answer and can't be had, usage, errors."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from meshnode.api.messages import Answer
from meshnode.http.body import Json, field, shown
from meshnode.http.problems import Problem, unsupported, wrong
from meshnode.text.question import Question

MAX_CHOICES: Final = 16
FINISH: Final = {"eos": "stop", "stop": "stop", "length": "length", "tool_calls": "tool_calls"}
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def error_document(problem: Problem) -> Json:
    """An error as the OpenAI API has it."""
    kind = _TYPES.get(problem.status, "invalid_request_error")
    return {"error": {"message": problem.text, "type": kind, "param": problem.param, "code": problem.code}}


def new_id(prefix: str) -> str:
    """An id of an answer, which nobody can guess."""
    return f"{prefix}{secrets.token_hex(12)}"


def choices_of(body: Json) -> int:
    """How many answers are wanted. Raises Problem 400."""
    count = field(body, "n", int, 1)
    if not 1 <= count <= MAX_CHOICES:
        raise wrong("n", f"n is {count}; it takes a whole number from 1 to {MAX_CHOICES}")
    best: int = field(body, "best_of", int, count)
    if best != count:
        raise unsupported("best_of", f"best_of is {best}; every answer that is made is given: leave it out, or set n")
    return int(count)


def spread(question: Question, count: int) -> tuple[Question, ...]:
    """The same question, so often; a seed goes on from one to the next."""
    if question.seed is None or count == 1:
        return (question,) * count
    return tuple(replace(question, seed=(question.seed + index) % (1 << 63)) for index in range(count))


def refuse_what_changes_answers(body: Json) -> None:
    """Raises Problem 400 for the first field that would change the answer and can't be had. Others are ignored."""
    if field(body, "functions", list, []) and body.get("function_call") != "none":
        raise unsupported("functions", "functions are the old name of tools: send them as tools")
    if field(body, "logit_bias", dict, {}):
        raise unsupported("logit_bias", "logit_bias can't be used here. Leave it out")
    if body.get("audio") is not None or "audio" in field(body, "modalities", list, []):
        raise unsupported("modalities", "answers are text here; modalities takes text alone")


def usage_of(answers: Sequence[Answer]) -> Json:
    """Tokens of a request with its choices; the prompt counts once."""
    prompt = len(answers[0].prompt_token_ids)
    completion = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answers[0].receipt.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def text_of(content: Any, at: str) -> str:
    """The text of a message: a string, or parts of text. Raises Problem 400."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise wrong(at, f"{at} is {shown(content)}; it takes a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        told = part if isinstance(part, dict) else {}
        kind = told.get("type")
        text = told.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise unsupported(at, f"{at}[{index}] is of type {shown(kind)}; this model reads text alone")
        if not isinstance(text, str):
            raise wrong(at, f"{at}[{index}].text is {shown(text)}; it takes a text")
        texts.append(text)
    return "\n".join(texts)
