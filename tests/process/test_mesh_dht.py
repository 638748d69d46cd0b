"""Three networks that know nothing of each other but one bootstrap peer, which serves the DHT to everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocols.ids import Cid
from tests.process.mesh_rig import NO_COPIES, READY_SECONDS, mesh_of, meshnode, serving, small_model, tokens_of

pytestmark = [pytest.mark.process, pytest.mark.slow]

PROVIDE_SECONDS = 30.0


def test_a_network_fetches_the_public_model_of_another(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model")
    files = {path.read_bytes() for path in published.iterdir() if path.name != "index.json"}
    with mesh_of(tmp_path / "meeting", 1, settings=(("content.dht_serve", True),)) as meeting:
        bootstrap = meeting.members[0]
        dht = ("content.dht", bootstrap.status()["addresses"][0])
        public = (dht, ("content.share", "anyone"))
        with mesh_of(tmp_path / "public", 1, published=published, settings=public) as giving:
            giver = giving.members[0]
            answer = tokens_of(giver)
            provided = giver.wait_for(
                lambda status: status["content"]["dht"]["provided"] > len(files),  # these and the manifest
                PROVIDE_SECONDS,
                "to name itself in the DHT for every file",
            )
            assert bootstrap.status()["content"]["dht"]["records"] == provided["content"]["dht"]["provided"]
            with mesh_of(tmp_path / "asking", 1, settings=(dht, *NO_COPIES)) as asking:
                asker = asking.members[0]
                manifest = Cid(provided["model"]["manifest"])
                ran = meshnode("model", "add", f"ipfs://{manifest}", folder=asker.folder)
                assert ran.code == 0, ran.errors
                asking.wait_ready(READY_SECONDS)
                assert tokens_of(asker) == answer
                assert len(serving(asker.status())) == 1
                # Nobody is a member of another's network, or takes another for one.
                for member in (bootstrap, giver, asker):
                    status = member.status()
                    assert status["peers"] == [] and status["refusals"] == []
                assert giver.status()["content"]["visitors"] == 1
