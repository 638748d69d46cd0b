"""From the fields of a dialect to a question: one place that asks `text/question.py` about the ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from meshnode.core.errors import BadRequest, Declined
from meshnode.http.body import Json, field
from meshnode.http.problems import Problem, problem_of, wrong
from meshnode.text.question import MAX_STOP_CHARACTERS, MAX_STOPS, RANGES, Question, read_question

DEFAULT_TOKENS: Final = 2048  # of an answer whose length nobody limits: stages keep memory for all of it
SEED_MASK: Final = (1 << 63) - 1

# Fields of questions that the dialects spell as we do.
PLAIN: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def sampling_of(body: Json, names: Mapping[str, str] = {}) -> dict[str, Any]:
    """Fields of a question out of a request.

    Args:
      names: of fields that the dialect calls otherwise, "num_predict" -> "max_tokens".

    Raises Problem 400.
    """
    asked: dict[str, Any] = {}
    for name in PLAIN:
        value = field(body, name, (int, float))
        if value is not None:
            asked[name] = value
    if asked.get("top_p") == 0:
        asked["top_p"] = RANGES["top_p"][0]  # "only the most likely token", as others read it
    if (seed := field(body, "seed", int)) is not None:
        asked["seed"] = seed & SEED_MASK
    for name, ours in names.items():
        if (value := field(body, name, int)) is not None:
            asked[ours] = value
    stop = field(body, "stop", (str, list), [])
    if isinstance(stop, list) and not all(isinstance(text, str) for text in stop):
        raise wrong("stop", f"stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
    if stop:
        asked["stop"] = stop
    return asked


def question_of(asked: Mapping[str, Any], adapter: str | None, names: Mapping[str, str] = {}) -> Question:
    """A checked question. `names`: as the dialect calls our fields, for sentences.

    Raises Problem 400, in the dialect's own words for the field.
    """
    known = {"max_tokens": DEFAULT_TOKENS, **asked}
    if adapter is not None:
        known["adapter"] = adapter
    try:
        return read_question(known)
    except BadRequest as error:
        text = str(error)
        ours = text.split(" ", 1)[0]
        theirs = next((theirs for theirs, mine in names.items() if mine == ours), ours)
        param = theirs if ours in known else None
        raise Problem(400, "invalid_value", text.replace(ours, theirs, 1) if param else text, param) from error
    except Declined as error:
        raise problem_of(error) from error
