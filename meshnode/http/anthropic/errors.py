"""Errors as the Anthropic API has them."""

from __future__ import annotations

from typing import Final

from meshnode.http.body import Json
from meshnode.http.problems import Problem

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def error_document(problem: Problem) -> Json:
    """Clients look for "prompt is too long" and make the conversation shorter then."""
    text = f"prompt is too long: {problem.text}" if problem.code == "context_length_exceeded" else problem.text
    return {"type": "error", "error": {"type": _TYPES.get(problem.status, "invalid_request_error"), "message": text}}
