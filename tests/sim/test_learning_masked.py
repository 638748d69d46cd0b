"""Whole nodes learn in masked cohorts, in virtual time, with a trainer that has no model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from meshnode.harness.hostile import HostileTrainer
from meshnode.services.learning.cohort import Cohorts, Outcome, _Run
from meshnode.sim.world import World
from protocols.cohort.masking import Pads
from protocols.delta.frame import Vector
from protocols.delta.messages import open_delta
from protocols.ids import PeerId
from protocols.notice.messages import DELTA
from tests.sim.test_learning_nodes import SEED, Class, SlowTrainer

VANISHES = 4  # round


@pytest.fixture
async def school(tmp_path: Path) -> AsyncIterator[Class]:
    async with World.open(SEED) as world:
        yield Class(world, tmp_path)


async def test_four_learn_and_one_vanishes_after_its_shares(
    autojump_clock: MockClock, school: Class, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in: dict[tuple[int, PeerId], Vector] = {}
    came_out: dict[tuple[int, PeerId], Outcome] = {}
    vanishing = trio.Event()
    mask, mean = _Run._mask, Cohorts.mean

    async def noted(
        self: Cohorts, number: int, participants: tuple[PeerId, ...], behind: frozenset[PeerId], vector: Vector
    ) -> Outcome:
        put_in[number, self._ground.us] = vector
        came_out[number, self._ground.us] = await mean(self, number, participants, behind, vector)
        return came_out[number, self._ground.us]

    async def mask_or_vanish(run: _Run, pads: Pads) -> None:
        device = school.world["n4"]
        if run._ground.us == device.peer_id and device.running.learning.report.round == VANISHES:
            vanishing.set()
            await trio.sleep_forever()
        await mask(run, pads)

    monkeypatch.setattr(Cohorts, "mean", noted)
    monkeypatch.setattr(_Run, "_mask", mask_or_vanish)
    school.add(4)
    frame = await school.begin(rounds=5, wait=60, mode="masked")
    world = school.world
    with trio.fail_after(3600):
        await vanishing.wait()
    await world.crash("n4")
    honest = ("n1", "n2", "n3")
    await world.until(lambda: school.done(*honest), within_s=3600)

    peers = {name: world[name].peer_id for name in world.devices}
    for number in range(1, 6):
        there = [peers[name] for name in (honest if number >= VANISHES else world.devices)]
        plain = np.mean([put_in[number, peer].astype(np.float64) for peer in there], axis=0)
        for peer in there:
            found = came_out[number, peer]
            assert found.included
            assert found.mean is not None
            np.testing.assert_allclose(found.mean, plain, atol=1e-5)
    vectors = [school.vector(name, frame) for name in honest]
    assert all((vector == vectors[0]).all() for vector in vectors), "all take the same"
    given = {peer: open_delta(content) for peer, content in world["n1"].running.directory.notices.all(DELTA).items()}
    assert len({given[peers[name]].made.cid for name in honest}) == 1, "all sign the same delta"
    assert all(record.samples == record.steps == 0 for record in given.values())
    before, after = await school.accuracy(frame, None, vectors[0])
    assert before <= 0.5, f"seed {SEED}"
    assert after >= 0.6  # whoever knows two labels of four has 0.5
    assert not [school.report(name).refusals for name in honest if school.report(name).refusals]


@pytest.mark.parametrize("gate", [40, 0])
async def test_a_spoilt_mean_is_not_taken(autojump_clock: MockClock, school: Class, gate: int) -> None:
    """Nobody sees which of the four sends its changes backwards; all see what came of it."""
    school.add(3)
    school.add(1, lambda: HostileTrainer(SlowTrainer(), "sign-flip"))
    frame = await school.begin(rounds=3, wait=60, mode="masked", gate=gate)
    honest = ("n1", "n2", "n3")
    await school.world.until(lambda: school.done(*honest), within_s=3600)
    before, after = await school.losses(frame, None, school.vector("n1", frame))
    refused = [school.report(name).refused["gate"] for name in honest]
    if gate:
        assert min(refused) >= 1
        assert after <= before
    else:
        assert after > before + 1, "otherwise the attack would show nothing"
