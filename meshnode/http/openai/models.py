"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.http.body import Json
from meshnode.http.door import Offered


def models_document(offered: Sequence[Offered]) -> Json:
    """All of them."""
    return {"object": "list", "data": [model_document(model) for model in offered]}


def model_document(model: Offered) -> Json:
    """One of them."""
    if model.upstream:
        return {
            "id": model.name,
            "object": "model",
            "created": model.created_s,
            "owned_by": f"a server of {model.upstream}",
            "upstream": model.upstream,
        }
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "meshnode",
        "root": model.manifest,
        "version": model.version,
        "variant": model.variant,
        "context_length": model.context,
        "max_model_len": model.context,  # as vLLM calls it
    }
