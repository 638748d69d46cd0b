"""Adapters between whole nodes in virtual time: proposed on one, released on all, taken back by the founder."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.api.commands import Commands
from meshnode.core.errors import BadRequest, Declined
from meshnode.services.learning.service import LearningService
from meshnode.services.port import Comparison
from meshnode.sim.world import Device, World
from protocols.adapter.manifest import AdapterManifest, encode_adapter
from protocols.ids import DAG_CBOR, RAW, Cid, cid_of
from protocols.manifest.messages import FileRef
from protocols.rollout.events import Pace
from protocols.rollout.messages import Candidate
from tests.rollouts import block

ADAPTER = block("an adapter")
PACE = Pace(collect_s=5, soak_s=5, report_s=2, retry_s=5)


SUITE = cid_of(RAW, b"suite")


async def compare(_service: LearningService, candidate: Candidate, seed: int) -> Comparison:
    """Every adapter is better."""
    await trio.sleep(1)
    return Comparison(samples=64, loss_new=0.4, loss_old=0.5, ci95=0.01)


@pytest.fixture(autouse=True)
def _quick_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LearningService, "suite", SUITE)
    monkeypatch.setattr(LearningService, "compare", compare)
    monkeypatch.setattr("meshnode.learning.Pace", lambda **_: PACE)


def used(device: Device) -> Cid | None:
    served = device.running.releases.current
    return None if served is None else device.running.rollout.current(served.cid)


async def mesh(world: World) -> list[Device]:
    devices = world.add(3, memory="8MB")
    devices += world.add(1, memory="8MB", roles=("serve",), by="n1")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    return devices


async def do(device: Device, command: str, **fields: Any) -> Any:
    """As the command line asks."""
    return [answer async for answer in Commands(device.running).table[command](fields)][-1]["done"]


async def test_an_adapter_is_released_and_taken_back_everywhere(world: World, autojump_clock: MockClock) -> None:
    devices = await mesh(world)
    served = devices[0].running.releases.current
    assert served is not None
    answer = await world.ask("n1")
    devices[0].running.rollout.propose(ADAPTER, served.cid, block("frame"))
    await world.until(lambda: all(used(device) == ADAPTER for device in devices))
    (release,) = await do(devices[3], "releases")
    assert release["version"] == "v1.0.0-1" and release["phase"] == "released" and release["in_use"]
    assert release["votes"] == 3 and release["voters"] == 3 and release["median"] == pytest.approx(-0.1)
    alone = await do(devices[3], "roll-back", release="", why="")
    assert "the others go on with it" in alone["effect"].lower() and used(devices[3]) is None
    ended = await do(devices[0], "roll-back", release="v1.0.0-1", why="it is rude")
    assert "ends everywhere" in ended["effect"]
    await world.until(lambda: all(used(device) is None for device in devices))
    assert await world.ask("n2") == answer
    with pytest.raises(Declined, match="the network's owner took it back: it is rude"):
        devices[1].running.rollout.propose(ADAPTER, served.cid, block("frame"))


async def test_proposals_are_checked_where_they_are_made(world: World, autojump_clock: MockClock) -> None:
    devices = await mesh(world)
    with pytest.raises(BadRequest, match="it takes the CID of an adapter"):
        await do(devices[0], "propose", adapter="v1.0.0-1")
    with pytest.raises(BadRequest, match="at most 100 characters"):
        await do(devices[0], "roll-back", release="", why="x" * 101)
    for owner, base, words in (
        (devices[0], block("another model"), "it is for another model release"),
        (devices[3], block("another model"), "lacks the role train"),
    ):
        manifest = AdapterManifest(
            base=base, frame=block("frame"), version=1, first=0, layers=(FileRef(cid=cid_of(RAW, b"x"), size=1),)
        )
        data = encode_adapter(manifest)
        assert owner.store is not None
        owner.store.put_block(data, DAG_CBOR)
        with pytest.raises(Declined, match=words):
            await do(owner, "propose", adapter=manifest.cid)


async def test_without_a_lesson_nothing_can_be_proposed(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LearningService, "suite", "")
    (device,) = world.add(1, memory="8MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    served = device.running.releases.current
    assert served is not None
    with pytest.raises(Declined, match="the network has no lesson"):
        device.running.rollout.propose(ADAPTER, served.cid, block("frame"))
    assert await do(device, "releases") == []
