"""A question, read and checked once: by the command line, by the library, and by the node that answers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict

from meshnode.core.errors import BadRequest, Declined

MAX_CHARACTERS: Final = 1 << 20  # of a prompt or a conversation: far above any context
MAX_TURNS: Final = 1024
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_TOKEN_ID: Final = (1 << 24) - 1
MAX_SHOWN: Final = 40  # characters of a wrong value
ROLES: Final = ("assistant", "system", "tool", "user")

# What each number may be: (lowest, highest), as protocols/pipe has them.
RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "max_tokens": (1, 1 << 20),
    "temperature": (0, 10),
    "top_p": (0.000001, 1),
    "top_k": (0, 1 << 20),
    "repetition_penalty": (0.1, 10),
    "seed": (0, (1 << 63) - 1),
}
_WHOLE: Final = frozenset({"max_tokens", "top_k", "seed"})

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


class Options(TypedDict, total=False):
    """How a question is answered; the names are those of the OpenAI API."""

    max_tokens: int  # longest answer; 512
    temperature: float  # 0 is greedy: always the most likely token; 0.7
    top_p: float  # of the most likely tokens, those that make up this share; 0.9, 1 is off
    top_k: int  # of the most likely tokens, this many; 0, which is off
    repetition_penalty: float  # above 1: tokens that were there become less likely; 1, which is off
    seed: int | None  # the same seed gives the same answer; drawn by the node
    stop: Sequence[str]  # the answer ends before any of these texts
    raw: bool  # a text is continued as it stands, without the model's chat template


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: exactly one of `prompt` (continued as it stands), `messages` (chat) and `token_ids`."""

    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None  # {"role": ..., "content": ...}
    token_ids: tuple[int, ...] | None = None
    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As it is sent to a node."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }


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
    return Question(**found)


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


def _messages(messages: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, (list, tuple)) or not 1 <= len(messages) <= MAX_TURNS:
        raise BadRequest(f"messages is a list of 1 to {MAX_TURNS} messages, each a role and a content")
    for message in messages:
        told = message if isinstance(message, Mapping) else {}
        role, content = told.get("role"), told.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise BadRequest(f"a message has a role ({', '.join(ROLES)}) and a content in text")
        _whole(content)
    if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
        raise Declined("too-long", f"the conversation has more than {MAX_CHARACTERS} characters")
    return tuple(dict(message) for message in messages)


def _token_ids(tokens: Any) -> tuple[int, ...]:
    if not isinstance(tokens, (list, tuple)) or not tokens:
        raise BadRequest("token_ids is a list of whole numbers, and not an empty one")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_TOKEN_ID:
            raise BadRequest(f"{token!r} is not a token id; they go from 0 to {MAX_TOKEN_ID}")
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


def _whole(text: str) -> str:
    """JSON can spell half a surrogate pair, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"character {error.start} of a text is half a surrogate pair, which is not text") from error
    return text
