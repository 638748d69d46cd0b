"""In whose words an error is said: that of the path which was asked."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from meshnode.http.anthropic.errors import error_document as anthropic
from meshnode.http.json_text import JsonResponse
from meshnode.http.ollama.fields import error_document as ollama
from meshnode.http.openai.fields import error_document as openai
from meshnode.http.problems import Problem

_SHAPES: Final = (("/api/", ollama), ("/v1/messages", anthropic))


def is_anthropic(request: Request) -> bool:
    """Whether a client of Anthropic's asks, at a path that OpenAI has as well."""
    return "anthropic-version" in request.headers


def refuse(path: str, problem: Problem) -> Response:
    """The response to a request that gets no answer."""
    shape = next((shape for start, shape in _SHAPES if path.startswith(start)), openai)
    headers = {"retry-after": str(problem.retry_s)} if problem.retry_s else {}
    if problem.status in (408, 413):
        headers["connection"] = "close"  # what is left of the body is not read
    return JsonResponse(shape(problem), problem.status, headers)
