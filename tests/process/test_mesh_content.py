"""A model on its way to a node that dies in the middle of its transfer."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest

from meshnode.api.messages import Status
from meshnode.core.paths import Paths
from meshnode.harness.member import Member
from tests.process.mesh_rig import LAYERS, NO_COPIES, READY_S, mesh_of, serving, small_model

pytestmark = [pytest.mark.net, pytest.mark.process]

NULL = (("serve.engine", "null"), *NO_COPIES)


def hashes(folder: Path) -> set[bytes]:
    return {hashlib.sha256(file.read_bytes()).digest() for file in folder.iterdir() if file.name != "index.json"}


def files_of(member: Member) -> Path:
    return Paths(member.folder).content / "files"


def test_a_transfer_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model", layer_bytes=6 << 20)
    size = sum(
        file.stat().st_size for file in published.iterdir() if file.name.startswith(("layer", "graph", "head"))
    )
    with mesh_of(tmp_path, 1, published=published, memory=("0",), wait=False, settings=NO_COPIES) as mesh:
        provider = mesh.members[0]
        fetcher = mesh.add("1GB", NULL)

        def half(status: Status) -> bool:
            return status.progress is not None and status.progress.bytes_done >= size // 2

        fetcher.wait_for(half, READY_S, "half of the transfer")
        fetcher.signal(signal.SIGKILL)
        fetcher.wait_stopped()
        before = provider.status().content.served_bytes
        assert 0.4 * size < before < 0.9 * size
        mesh.up()
        fetcher.wait_ready(READY_S)
        again = fetcher.status().content.fetched_bytes
        print(f"\n{before / 1e6:.0f} MB before, {again / 1e6:.0f} MB after the kill, of {size / 1e6:.0f} MB")
        assert before + again <= 1.1 * size
        assert hashes(files_of(fetcher)) <= hashes(published)
        assert serving(fetcher.status())[fetcher.peer_id] == (0, LAYERS)
