"""The commands that keep and free files, and encrypted files, in a mesh of real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.api.messages import Status
from meshnode.cli.status import describe
from meshnode.core.paths import Paths
from tests.process.mesh_rig import NO_COPIES, READY_S, mesh_of, meshnode, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]


def enough(nodes: int) -> Callable[[Status], bool]:
    def check(status: Status) -> bool:
        copies = status.copies
        return copies is not None and copies.nodes == nodes and copies.fewest >= 2 and not copies.short

    return check


def test_a_model_is_pinned_unpinned_and_removed(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model")
    with mesh_of(tmp_path, 2, published=published, settings=NO_COPIES) as mesh:
        publisher, other = mesh.members
        content = Paths(other.folder).content / "files"
        files = {path.name for path in (Paths(publisher.folder).content / "files").iterdir()}
        assert {path.name for path in content.iterdir()} < files, "its layers only"
        answer = meshnode("model", "pin", "small-noise", folder=other.folder)
        assert answer.code == 0, answer.errors
        assert "small-noise v1.0.0-0 int4 (" in answer.out and "stays" in answer.out
        assert {path.name for path in content.iterdir()} == files
        answer = meshnode("model", "pin", "small-noise", "--variant", "int8", folder=other.folder)
        assert answer.code == 4
        assert "has no variant int8; it has int4" in answer.errors
        answer = meshnode("model", "remove", "small-noise", folder=other.folder)
        assert "The network serves small-noise at the moment" in answer.errors
        for wanted in (0, 2):
            answer = meshnode("model", "unpin", "small-noise", folder=other.folder)
            assert answer.code == wanted, answer.errors
        assert "is not pinned on this node" in answer.errors
        other.stop()
        answer = meshnode("model", "pin", "small-noise", folder=other.folder)
        assert answer.code == 7
        answer = meshnode("model", "remove", "small-noise", folder=other.folder)
        assert answer.code == 2
        assert "keeps" in answer.errors and "--force" in answer.errors
        answer = meshnode("model", "remove", "small-noise", "--force", folder=other.folder)
        assert answer.code == 0, answer.errors
        assert list(content.iterdir()) == []


@pytest.mark.long
def test_encrypted_files_serve_as_others_do(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model")
    with mesh_of(tmp_path, 2, published=published, settings=(("content.encrypt", True),)) as mesh:
        publisher, other = mesh.members
        for member in mesh.members:
            member.wait_for(enough(2), READY_S, "two copies of every file")
        right = tokens_of(other)
        answer = meshnode("model", "verify", "small-noise", folder=other.folder)
        assert answer.code == 0, answer.errors
        piece = (published / "layer.3").read_bytes()[1000:1032]
        for member in mesh.members:
            assert "encrypted on the disk" in describe(member.status())
            files = list((Paths(member.folder).content / "files").iterdir())
            assert {path.suffix for path in files} == {".sealed"}
            assert not any(piece in path.read_bytes() for path in files)
        mesh.down()
        for member in mesh.members:
            config = Paths(member.folder).config
            config.write_text(config.read_text().replace("encrypt = true", "encrypt = false"))
        mesh.up()
        mesh.wait_ready(READY_S)
        assert tokens_of(publisher) == right
        assert any(piece in path.read_bytes() for path in (Paths(other.folder).content / "files").iterdir())
