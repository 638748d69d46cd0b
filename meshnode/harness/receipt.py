"""What a mesh did with one question: the answer, where each token was computed, and what each node cost."""

from __future__ import annotations

from typing import Any

import psutil

from meshnode.api.messages import Answer
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from meshnode.text.question import Question

Json = dict[str, Any]


def ask(mesh: Mesh, question: Question, asker: Member | None = None) -> Json:
    """Put a question to one node of the mesh (default: the first that serves); a receipt.

    Raises what `Client.generate` raises.
    """
    asker = asker or mesh.serving[0]
    return complete(mesh, asker, asker.client.ask(question).whole())


def complete(mesh: Mesh, asker: Member, answer: Answer) -> Json:
    """A node's answer with the names of the stages, and what every node of the mesh holds and costs."""
    names = {member.peer_id: member.name for member in mesh.members}
    done = answer.as_json()
    for entry in (*done["route"], *done["hops"]):
        entry["name"] = names.get(entry["peer"], "")
    return {**done, "asked": asker.name, "nodes": [node_line(member) for member in mesh.members]}


def node_line(member: Member) -> Json:
    """What one running node holds and costs. Memory in MB (1e6 bytes) of resident pages."""
    status = member.status()
    engine, me = status.engine, status.me
    node_mb = status.rss_bytes / 1e6
    engine_mb = 0.0 if engine is None else engine.rss_bytes / 1e6
    return {
        "name": member.name,
        "peer": member.peer_id,
        "pid": status.pid,
        "engine_pid": None if engine is None else engine.pid,
        "rss_mb": round(node_mb + engine_mb, 1),
        "node_rss_mb": round(node_mb, 1),
        "engine_rss_mb": round(engine_mb, 1),
        "weights_mb": 0.0 if engine is None else round(engine.weight_bytes / 1e6, 1),
        "memory_limit_mb": round(me.memory_bytes / 1e6, 1),
        "layers": None if me.first is None else [me.first, me.last],
        "bytes_fetched": status.content.fetched_bytes,
        "bytes_served": status.content.served_bytes,
        "torch_imported": status.torch_imported or any(_maps_torch(p) for p in member.processes()),
    }


def _maps_torch(process: psutil.Process) -> bool:
    """Whether torch's library is mapped into a process: a look from outside, which the process can't get wrong."""
    try:
        return any("libtorch" in region.path for region in process.memory_maps())
    except (psutil.Error, AttributeError, NotImplementedError):
        return False
