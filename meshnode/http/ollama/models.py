"""/api/tags, /api/show, /api/ps, /api/version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from meshnode import __version__
from meshnode.http.body import Json
from meshnode.http.door import Offered
from meshnode.http.ollama.fields import date_of

SPOKEN: Final = "0.12.0"  # the Ollama whose routes these are; clients refuse lower ones


def version_document() -> Json:
    """Clients read `version`; people see who we are."""
    return {"version": SPOKEN, "meshnode": __version__}


def tags_document(offered: Sequence[Offered]) -> Json:
    """Every model."""
    return {"models": [_model(model) for model in offered]}


def ps_document(offered: Sequence[Offered], now_s: int) -> Json:
    """Every loaded model: what the mesh serves stays loaded."""
    return {
        "models": [
            {
                **_model(model),
                "size_vram": 0,
                "context_length": model.context,
                "expires_at": date_of(now_s + 86_400),
            }
            for model in offered
        ]
    }


def show_document(model: Offered) -> Json:
    """One model in detail."""
    return {
        "modelfile": f"# {model.name} {model.version}, served by a mesh\nFROM {model.manifest}\n",
        "parameters": "",
        "template": "",
        "details": _details(model),
        "model_info": {
            "general.architecture": model.family,
            "general.basename": model.name,
            f"{model.family}.context_length": model.context,
            f"{model.family}.embedding_length": model.hidden,
            f"{model.family}.block_count": model.layers,
        },
        "capabilities": ["completion", "tools", "embedding"],
        "modified_at": date_of(model.created_s),
    }


def _model(model: Offered) -> Json:
    if model.upstream:  # as Ollama marks what another machine runs
        return {
            "name": model.name,
            "model": model.name,
            "modified_at": date_of(model.created_s),
            "size": 0,
            "digest": "",
            "remote_model": model.name,
            "remote_host": model.upstream,
            "details": _details(model),
        }
    name = f"{model.name}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": date_of(model.created_s),
        "size": model.size_bytes,
        "digest": model.manifest,
        "details": _details(model),
    }


def _details(model: Offered) -> Json:
    return {
        "parent_model": "",
        "format": "onnx",
        "family": model.family,
        "families": [model.family],
        "parameter_size": "",
        "quantization_level": model.variant,
    }
