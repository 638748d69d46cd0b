"""Texts as vectors, for OpenAI's and Ollama's routes."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any, Final

from meshnode.api.messages import Embedding
from meshnode.http.body import Json, field, shown
from meshnode.http.models import Chosen
from meshnode.http.problems import unsupported, wrong

MAX_TEXTS: Final = 256  # of one request


def texts_of(body: Json, name: str = "input") -> list[str | list[int]]:
    """A text, token ids, or a list of either. Raises Problem 400."""
    given = body.get(name)
    if isinstance(given, str) or _tokens(given):
        return [given]  # type: ignore[list-item]
    if (
        isinstance(given, list)
        and 1 <= len(given) <= MAX_TEXTS
        and all(isinstance(part, str) or _tokens(part) for part in given)
    ):
        return given
    raise wrong(name, f"{name} takes a text, token ids, or a list of up to {MAX_TEXTS} of either")


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def check_size(body: Json, chosen: Chosen) -> None:
    """Raises Problem 400: vectors are as long as the model makes them."""
    size = field(body, "dimensions", int)
    if size not in (None, chosen.model.hidden):
        text = f"dimensions is {size}; vectors of {chosen.model.name} have {chosen.model.hidden}"
        raise unsupported("dimensions", text)
    form = field(body, "encoding_format", str, "float")
    if form not in ("float", "base64"):
        raise wrong("encoding_format", f"encoding_format is {shown(form)}; it takes float or base64")


def openai_document(body: Json, chosen: Chosen, made: Sequence[Embedding]) -> Json:
    """As /v1/embeddings answers."""
    tokens = sum(len(one.prompt_token_ids) for one in made)
    packed = body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(one.vector) if packed else list(one.vector)}
        for index, one in enumerate(made)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": chosen.model.name, "usage": usage}


def ollama_document(chosen: Chosen, made: Sequence[Embedding], took_ns: int) -> Json:
    """As /api/embed answers."""
    return {
        "model": chosen.model.name,
        "embeddings": [list(one.vector) for one in made],
        "total_duration": took_ns,
        "load_duration": 0,
        "prompt_eval_count": sum(len(one.prompt_token_ids) for one in made),
    }


def _packed(vector: Sequence[float]) -> str:
    """Little-endian float32, which OpenAI's clients ask for."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
