"""What is wrong with a request, as HTTP says it; each dialect has its own shape for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshnode.core.errors import BadRequest, Declined, ModelError, TransientError
from protocols.errors import MeshError

RETRY_S: Final = 2  # after which it is worth asking again, where nobody knows better


@dataclass(eq=False)
class Problem(Exception):
    """A request that gets no answer, or no whole one.

    Codes: `invalid_value`, `context_length_exceeded`, `model_not_found`, `invalid_api_key`, `forbidden`,
    `rate_limit_exceeded`, `not_ready`, `overloaded`, `too_large`, `timeout`, `not_found`, `method_not_allowed`,
    `internal_error`, `unsupported`, `conflict`.
    """

    status: int
    code: str
    text: str
    param: str | None = None  # the field that is wrong
    retry_s: int = 0  # 0: asking again changes nothing

    def __str__(self) -> str:
        return self.text


def wrong(param: str, text: str) -> Problem:
    """A field that can't be used as it is. `text` is the whole sentence."""
    return Problem(400, "invalid_value", text, param)


def unsupported(param: str, text: str) -> Problem:
    """A field that is right in the dialect and would change the answer, but not here."""
    return Problem(400, "unsupported", text, param)


# codes of Declined: status, our code, whether asking again may help
_DECLINED: Final[dict[str, tuple[int, str, bool]]] = {
    "too-long": (400, "context_length_exceeded", False),
    "forbidden": (403, "forbidden", False),
    "no-model": (503, "not_ready", True),
    "not-ready": (503, "not_ready", True),
    "no-route": (503, "not_ready", True),
    "busy": (503, "overloaded", True),
    "no-adapter": (404, "model_not_found", False),
    "bad-adapter": (400, "invalid_value", False),
    "no-tokenizer": (400, "unsupported", False),
}


def internal() -> Problem:
    """A bug of ours."""
    return Problem(500, "internal_error", "the request failed because of a bug in this node; its log shows where")


def problem_of(error: MeshError) -> Problem:
    """The same cause gets the same status, whoever notices it."""
    match error:
        case BadRequest():
            return Problem(400, "invalid_value", str(error))
        case Declined():
            status, code, again = _DECLINED.get(error.code, (503, "overloaded", True))
            retry_s = max(1, -(-error.retry_ms // 1000)) if error.retry_ms else RETRY_S
            return Problem(status, code, str(error), retry_s=retry_s if again else 0)
        case TransientError():
            return Problem(503, "overloaded", str(error), retry_s=RETRY_S)
        case ModelError():
            return Problem(500, "internal_error", str(error))
        case _:
            return internal()
