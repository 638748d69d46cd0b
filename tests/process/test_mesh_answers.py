"""Three nodes that hold a third of a model each: the answer of one machine, and nothing fetched that isn't needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshnode.core.paths import Paths
from meshnode.harness.mesh import QUOTA_BYTES, Mesh
from meshnode.harness.receipt import ask
from meshnode.store.blob_store import BlobStore
from protocols.ids import Cid
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import Manifest
from tests.process.mesh_rig import LAYERS, NO_COPIES, QUESTION, mesh_of, meshnode, serving, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

SAMPLED = replace(QUESTION, max_tokens=40, temperature=0.8, top_p=0.9, seed=99)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("thirds")
    with mesh_of(folder, 3, published=small_model(folder / "model"), settings=NO_COPIES) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What one node that holds the whole model answers."""
    folder = tmp_path_factory.mktemp("alone")
    with mesh_of(folder, 1, published=small_model(folder / "model"), memory=("1GB",)) as mesh:
        only = mesh.members[0]
        assert serving(only.status()) == {only.peer_id: (0, LAYERS)}
        return {"greedy": tokens_of(only), "sampled": tokens_of(only, SAMPLED)}


def manifest_of(mesh: Mesh) -> tuple[Manifest, int]:
    """The manifest and its own size in bytes, out of the first node's store."""
    first = mesh.members[0]
    cid = Cid(first.status().model.manifest)
    store = BlobStore(Paths(first.folder).content, QUOTA_BYTES)
    try:
        block = store.block(cid)
    finally:
        store.close()
    assert block is not None
    return open_manifest(block), len(block)


def test_three_stages_answer_like_one_node(mesh: Mesh, alone: dict[str, list[int]]) -> None:
    for member in mesh.members:
        receipt = ask(mesh, QUESTION, member)
        assert receipt["token_ids"] == alone["greedy"]
        assert [(hop["first"], hop["last"]) for hop in receipt["route"]] == [(0, 8), (8, 16), (16, 24)]
        assert {hop["name"] for hop in receipt["hops"]} == {"node1", "node2", "node3"}
        assert tokens_of(member, SAMPLED) == alone["sampled"]


def test_each_node_fetched_only_its_layers(mesh: Mesh) -> None:
    manifest, size = manifest_of(mesh)
    files = manifest.variants["int4"]
    for member in mesh.members[1:]:
        tokens_of(member)  # whoever is asked needs the tokenizer
        status = member.status()
        mine = files.groups(*serving(status)[member.peer_id])
        shared = size + files.graph.size + manifest.files["tokenizer.json"].size
        wanted = shared + sum(file.size for file in mine.values())
        fetched = status.content.fetched_bytes
        assert wanted <= fetched <= 1.02 * wanted, (member.name, wanted, fetched)
    assert mesh.members[0].status().content.fetched_bytes == 0


def test_nobody_imports_torch(mesh: Mesh) -> None:
    receipt = ask(mesh, QUESTION)
    assert [node["torch_imported"] for node in receipt["nodes"]] == [False] * 3
    assert all(node["engine_pid"] for node in receipt["nodes"])


def test_the_command_lines(mesh: Mesh, alone: dict[str, list[int]]) -> None:
    folder = mesh.members[1].folder
    done = meshnode("generate", "w5 w6 w7", "--raw", "--greedy", "--max-tokens", 12, folder=folder)
    assert done.code == 0, done.errors
    assert done.out.split() == [f"w{token}" for token in alone["greedy"]]
    status = meshnode("status", folder=folder)
    assert status.code == 0
    assert "ready" in status.out
    assert "small-noise" in status.out


def test_two_questions_at_once(mesh: Mesh, alone: dict[str, list[int]]) -> None:
    streams = [member.client.ask(QUESTION) for member in mesh.members]
    for stream in streams:
        next(stream)
    assert [list(stream.whole().token_ids) for stream in streams] == [alone["greedy"]] * 3
