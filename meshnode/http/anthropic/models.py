"""GET /v1/models for the Anthropic SDKs, which say so with the header anthropic-version."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from meshnode.http.body import Json
from meshnode.http.door import Offered


def models_document(offered: Sequence[Offered]) -> Json:
    """All of them, on one page."""
    models = [model_document(model) for model in offered]
    names = [model["id"] for model in models] or [None]
    return {"data": models, "has_more": False, "first_id": names[0], "last_id": names[-1]}


def model_document(model: Offered) -> Json:
    """One of them."""
    created = datetime.fromtimestamp(model.created_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": created,
        "max_input_tokens": model.context,
        "max_tokens": model.context,
    }
