"""What Ollama's routes have in common."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from meshnode.api.messages import Answer
from meshnode.http.body import Json, field, shown
from meshnode.http.problems import Problem, unsupported, wrong
from meshnode.http.sampling import sampling_of

MEDIA_TYPE: Final = "application/x-ndjson"
REASONS: Final = {"eos": "stop", "stop": "stop", "length": "length", "tool_calls": "stop"}
NS_PER_MS: Final = 1_000_000


def error_document(problem: Problem) -> Json:
    """An error as Ollama has it."""
    return {"error": problem.text}


def date_of(seconds: int) -> str:
    """As Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000000Z")


def options_of(body: Json) -> dict[str, Any]:
    """The `options` as fields of a question; those about the machine (num_ctx, num_thread ...) are passed over.

    Raises Problem 400.
    """
    options = dict(field(body, "options", dict, {}))
    if "repeat_penalty" in options:
        options["repetition_penalty"] = options.pop("repeat_penalty")
    count = field(options, "num_predict", int, at="options.")
    if count is not None and count < 0:  # without an end, or until the context is full
        options.pop("num_predict")
    if options.get("seed") == -1:  # any
        options.pop("seed")
    return sampling_of(options, {"num_predict": "max_tokens"})


def form_of(body: Json) -> dict[str, Any]:
    """`format`: "json", or a JSON schema. Raises Problem 400."""
    form = field(body, "format", (str, dict))
    if form in (None, ""):
        return {}
    if isinstance(form, dict):
        return {"json_schema": form}
    if form != "json":
        raise wrong("format", f"format is {shown(form)}; it takes json, or a JSON schema")
    return {"json_object": True}


def refuse_what_changes_answers(body: Json) -> None:
    """Raises Problem 400 for the first field that would change the answer and can't be had."""
    if field(body, "images", list, []):
        raise unsupported("images", "this model reads text alone; leave images out")


def figures_of(answer: Answer, took_ns: int) -> Json:
    """The end of an answer: why, how many tokens, how long. Times are nanoseconds."""
    receipt = answer.receipt
    prompt_ns = int(receipt.ttft_ms * NS_PER_MS)
    return {
        "done": True,
        "done_reason": REASONS[answer.reason],
        "total_duration": max(took_ns, prompt_ns),
        "load_duration": 0,
        "prompt_eval_count": len(answer.prompt_token_ids),
        "prompt_eval_duration": prompt_ns,
        "eval_count": len(answer.token_ids),
        "eval_duration": max(0, took_ns - prompt_ns),
    }
