"""A data folder that is copied and started beside the true node: real processes."""

from __future__ import annotations

import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.api.messages import Status
from meshnode.harness.mesh import free_ports
from tests.process.mesh_rig import READY_S, mesh_of, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process, pytest.mark.slow]

BACK_S = 15.0  # promised, from the moment at which the copy stops
NOTICED_S = 40.0


def live(status: Status) -> set[str]:
    """Whom a node plans with, beside itself."""
    return {peer.peer for peer in status.peers}


@pytest.mark.long
def test_the_true_node_is_back_soon_after_its_copy_was_killed(tmp_path: Path) -> None:
    with mesh_of(tmp_path, 3, published=small_model(tmp_path / "model")) as mesh:
        asker, other, true = mesh.members
        usual = tokens_of(asker)
        process = true.pid
        copy = replace(true, name="copy", folder=tmp_path / "copy", pid=None, started=None)
        shutil.copytree(true.folder, copy.folder, ignore=shutil.ignore_patterns("*.sock", "logs"))
        (copy.folder / "logs").mkdir()
        config = copy.folder / "config.toml"
        (old,) = re.findall(r"/ip4/127.0.0.1/tcp/\d+", config.read_text())
        config.write_text(config.read_text().replace(old, f"/ip4/127.0.0.1/tcp/{free_ports(1)[0]}"))
        copy.launch()
        try:
            copy.wait_answers()
            for member in (asker, other, copy, true):
                member.wait_for(
                    lambda s: any(one.code == "two-writers" for one in s.health), NOTICED_S, "a word about the copy"
                )
            for member in (asker, other):
                member.wait_for(lambda s: true.peer_id not in live(s), NOTICED_S, "nobody relies on them")
        finally:
            copy.signal(signal.SIGKILL)
            copy.wait_stopped()
        began = time.monotonic()
        for member in (asker, other):
            member.wait_for(lambda s: true.peer_id in live(s), READY_S, "the true node back")
        took = time.monotonic() - began
        print(f"\nthe true node is back {took:.1f} s after its copy was killed")
        assert took < BACK_S
        mesh.wait_ready(READY_S)
        assert tokens_of(asker) == usual
        assert true.pid == process and true.process() is not None, "without a restart"
        for member in mesh.members:
            codes = {one.code for one in member.status().health}
            assert not codes & {"two-writers", "bad-provider"}, codes
