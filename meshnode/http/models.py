"""Which model a request means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshnode.http.body import shown
from meshnode.http.door import Door, Offered
from meshnode.http.problems import RETRY_S, Problem, unsupported, wrong

AUTO: Final = "auto"  # whatever is served
LATEST: Final = "latest"  # Ollama's clients put it behind a name without a tag


@dataclass(frozen=True, slots=True)
class Chosen:
    """The model that answers, and what was learned that answers with it (`Question.adapter`)."""

    model: Offered
    adapter: str | None


def choose(door: Door, name: Any) -> Chosen:
    """`NAME`, `NAME:VARIANT`, the CID of its manifest, or `auto`; with `@none` or `@CID` behind it for an adapter.

    Raises Problem: 404 with what is served; 503 while nothing is.
    """
    offered = door.models()
    if name is None:
        name = AUTO
    if not isinstance(name, str):
        raise wrong("model", f"model is {shown(name)}; it takes the name of a model")
    if not offered or (name == AUTO and all(model.upstream for model in offered)):
        raise Problem(503, "not_ready", door.why_no_model(), retry_s=RETRY_S)
    base, _, adapter = name.partition("@")
    for model in offered:
        if base in names_of(model):
            return Chosen(model, adapter or None)
    served = " and ".join(model.name for model in offered)
    raise Problem(
        404,
        "model_not_found",
        f"this network serves no model {shown(name)}; it serves {served} (or say auto)",
        "model",
    )


def computed(chosen: Chosen) -> Chosen:
    """For what only the mesh itself can do: count tokens, make vectors. Raises Problem 400."""
    if chosen.model.upstream:
        raise unsupported(
            "model",
            f"{chosen.model.name} runs on a server of {chosen.model.upstream}, which is asked for answers alone",
        )
    return chosen


def find(offered: Sequence[Offered], name: str) -> Offered:
    """The model of that name. Raises Problem 404."""
    for model in offered:
        if name in names_of(model):
            return model
    raise Problem(404, "model_not_found", f"this network serves no model {name[:80]}", "model")


def names_of(model: Offered) -> Sequence[str]:
    """All names of one model. Nobody gets the answer of a member's server who has not asked for it by name."""
    if model.upstream:
        return (model.name,)
    return (AUTO, model.name, model.manifest, f"{model.name}:{model.variant}", f"{model.name}:{LATEST}")
