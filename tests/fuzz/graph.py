"""A graph that was injured: how far it gets. None but ModelError comes out of the checks."""

from __future__ import annotations

from meshnode.core.errors import ModelError
from meshnode.engine.cut import WeightlessGraph
from meshnode.engine.graph_file import GraphFile
from meshnode.engine.graph_wire import Refused, scan


def check(content: bytes) -> str:
    """ "refused" by the scanner, "scanned", "accepted" by the checks, or "cut"."""
    try:
        scan(content)
    except Refused:
        return "refused"
    reached = "scanned"
    try:
        graph = WeightlessGraph(GraphFile("fuzzed", content))
        reached = "accepted"
        graph.layers(0, 1)
    except ModelError:
        return reached
    return "cut"
