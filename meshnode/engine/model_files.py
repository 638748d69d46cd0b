"""The files of a span, open and not looked at: an engine opens them before it gives up files."""

from __future__ import annotations

from pathlib import Path

from meshnode.engine.graph_file import GraphFile, open_graph
from meshnode.engine.weights import Weights
from protocols.enginewire.messages import Load


class ModelFiles:
    """What a Load names: the graph in memory, the weights mapped."""

    def __init__(self, load: Load) -> None:
        """Raises ModelError for a file that can't be opened."""
        self.graph: GraphFile = open_graph(Path(load.graph), load.graph_name)
        self.weights = Weights({group.name: Path(group.path) for group in load.groups})
