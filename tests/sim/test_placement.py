"""Who serves what: real nodes in virtual time, gossip that gets lost, engines that take time."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from meshnode.config.settings import ContentSection
from meshnode.core.errors import ModelError
from meshnode.engine.local import LocalEngine
from meshnode.engine.port import StageReport
from meshnode.model.fit import tight_memory
from meshnode.node import Node as Running
from meshnode.policy.placement import Node, plan
from meshnode.sim.model import ModelSpec
from protocols.advert.messages import DRAINING, SERVING
from protocols.intent.messages import HOLD_MS, Held, Hold
from tests.long import some
from tests.sim.coverage import FACTS, SLACK, SPEC, Coverage, covering, memory_for, span_of

ALL = f"{FACTS.need(0, FACTS.layers) + SLACK}B"  # memory for the whole model


def codes(node: Running) -> dict[str, str]:
    """What is wrong with a node, and its sentences."""
    return {shown.code: shown.text for shown in node.health.current()}


async def test_one_node_that_can_serves_everything(autojump_clock: MockClock) -> None:
    async with covering(1, first=ALL) as mesh:
        assert await mesh.covered(10) < 3
        node = mesh.world["n1"].running
        me = node.directory.me()
        assert me.serving is not None and me.serving.state == SERVING
        assert me.layer_decode_us > 0
        assert node.placement.prediction is not None
        assert node.placement.prediction.stages == ((node.identity.peer_id, (0, 12)),)


@pytest.mark.parametrize("nodes", [2, 3, 8])
async def test_a_tight_mesh_covers_soon_after_the_last_join(autojump_clock: MockClock, nodes: int) -> None:
    async with covering(nodes) as mesh:
        for _ in range(nodes):
            await mesh.join(memory=f"{tight_memory(FACTS, nodes)}B")
            await trio.sleep(0.2)
        assert await mesh.covered(6) < 4
        assert len(mesh.spans()) == nodes
        assert mesh.moves == 0, "nobody had to move after its first place"


@pytest.mark.parametrize("seed", range(4))
async def test_nodes_with_different_limits_that_come_one_by_one(autojump_clock: MockClock, seed: int) -> None:
    """However far apart they come, and with memory that is just enough: covered 10 s after the last one."""
    rng = random.Random(seed)
    async with covering(seed) as mesh:
        mesh.world.network.set_gossip_loss(0.05)
        cuts = [0, *sorted(rng.sample(range(1, 12), 4)), 12]
        limits = [FACTS.need(a, b) + rng.randrange(SLACK) for a, b in itertools.pairwise(cuts)]
        rng.shuffle(limits)
        for limit in limits:
            await trio.sleep(rng.choice((0.1, 1.0, 8.0)))
            await mesh.join(memory=f"{limit}B")
        assert await mesh.covered(20) <= 10
        (sixth,) = await mesh.join(memory=memory_for(4))
        await mesh.world.until(lambda: span_of(sixth) is not None, within_s=10)
        await trio.sleep(60)
        assert not mesh.holes()
        assert mesh.voluntary_holes == []


async def test_each_node_fetches_its_own_layers_only(mesh: Coverage, autojump_clock: MockClock) -> None:
    members = await mesh.join(3, memory=f"{tight_memory(FACTS, 3)}B", content=ContentSection(replicas=1))
    await mesh.covered(10)
    for device in members:
        release, span = device.running.releases.current, span_of(device)
        assert release is not None and span is not None and device.store is not None
        needed = {file.cid for file in release.variant.files(*span).values()}
        assert device.store.files() & {file.cid for file in release.variant.files().values()} == needed


async def test_a_leaving_node_hands_over_first(mesh: Coverage, autojump_clock: MockClock) -> None:
    await mesh.join(3, memory=memory_for(6))
    await mesh.covered(10)
    await trio.sleep(20)
    spans = mesh.spans()
    leaver = next(name for name, span in spans.items() if list(spans.values()).count(span) == 1)
    load, watcher = mesh.world[leaver].running.load, mesh.world["n1"].running
    load.count(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.world.leave, leaver)
        peer = mesh.world[leaver].peer_id
        await mesh.world.until(
            lambda: (at := watcher.directory.live()[peer].serving) is not None and at.state == DRAINING
        )
        await mesh.covered(10)
        load.count(0)
    assert not mesh.holes()
    assert mesh.voluntary_holes == []


async def test_nodes_that_nobody_can_replace_leave_when_their_sessions_have_ended(
    mesh: Coverage, autojump_clock: MockClock
) -> None:
    a, b = await mesh.join(2, memory=f"{tight_memory(FACTS, 2)}B")
    await mesh.covered(10)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.world.leave, a.name)
        nursery.start_soon(mesh.world.leave, b.name)
    assert trio.current_time() - began < 2


async def test_a_lost_engine_leaves_the_advert_and_comes_back(autojump_clock: MockClock) -> None:
    async with covering(1, first=ALL) as mesh:
        await mesh.covered(10)
        device = mesh.world["n1"]
        device.engines[-1].lose("it was killed")
        await mesh.world.until(lambda: bool(mesh.holes()), within_s=1)
        assert "engine-restarting" in codes(device.running)
        assert await mesh.covered(10) < 5
        assert len(device.engines) == 2
        await trio.sleep(150)
        assert "engine-restarting" not in codes(device.running), "it has run for a while"


async def test_an_engine_that_does_not_start_is_tried_again(mesh: Coverage, autojump_clock: MockClock) -> None:
    (device,) = mesh.world.add(memory=ALL)
    device.broken = "the engine process ended before it was ready"
    await mesh.start(device.name)
    await trio.sleep(10)
    assert len(device.engines) >= 2
    await mesh.world.until(lambda: "span-failed" in codes(device.running))
    assert "the engine process ended before it was ready" in codes(device.running)["span-failed"]
    device.broken = ""
    await mesh.covered(60)
    assert "span-failed" not in codes(device.running)


async def test_a_model_that_can_not_be_opened_is_not_tried_for_ever(
    mesh: Coverage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes are refused again; another model is tried at once."""

    async def refuse(_: LocalEngine) -> StageReport:
        raise ModelError("The graph bafkgraph is not run: it reads files.")

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "start", refuse)
        (device,) = mesh.world.add(memory=ALL)
        await mesh.start(device.name)
        await mesh.world.until(lambda: "model-unusable" in codes(device.running))
        assert "it reads files. It is not tried again" in codes(device.running)["model-unusable"]
        await trio.sleep(600)
        assert len(device.engines) == 1
        me = device.running.directory.me()
        assert me.memory_bytes == 0, "others plan without it"
        assert "it reads files" in me.trouble, "and may read why"
        assert "span-failed" not in codes(device.running)
    await mesh.world.publish("n1", replace(SPEC, seed=9))
    await mesh.world.until(lambda: span_of(device) is not None)
    assert "model-unusable" not in codes(device.running)


async def test_what_a_span_needs_is_pinned_before_it_is_fetched(mesh: Coverage, autojump_clock: MockClock) -> None:
    """Or else the room for one of its files is made by evicting another one that is here."""
    (device,) = mesh.world.add(memory=ALL)
    mesh.world.network.set_link(mesh.world["n1"].peer_id, device.peer_id, bandwidth=20_000)
    await mesh.start(device.name)
    await mesh.world.until(lambda: device.running.spans.loading is not None)
    store, release = device.store, device.running.releases.current
    assert store is not None and release is not None
    needed = {file.cid for file in release.variant.files().values()}
    assert not needed & store.files()
    assert store.pins()["span-0"] == needed


async def test_a_promise_does_not_hold_back_a_node_when_everybody_leaves(
    mesh: Coverage, autojump_clock: MockClock
) -> None:
    a, b = await mesh.join(2, memory=f"{tight_memory(FACTS, 2)}B")
    await mesh.covered(10)
    opened = a.running.spans.serving
    assert opened is not None
    span = opened.span
    hold = Hold(
        manifest=span.manifest,
        variant=span.variant,
        first=span.first,
        last=span.last,
        epoch=1,
        hold_ms=HOLD_MS,
    )
    assert isinstance(a.running.placement.answer_hold(b.peer_id, hold), Held)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.world.leave, a.name)
        nursery.start_soon(mesh.world.leave, b.name)
    assert trio.current_time() - began < 2


async def test_a_model_that_does_not_fit_is_said_with_figures(autojump_clock: MockClock) -> None:
    async with covering(1, first=memory_for(5)) as mesh:
        (tiny,) = await mesh.join(memory="5kB")
        await trio.sleep(15)
        shown = codes(mesh.world["n1"].running)
        assert "layers 5 to 11 of noise int4" in shown["not-covered"]
        assert "are missing" in shown["not-covered"], shown
        shown = codes(tiny.running)
        assert "Raise serve.memory to at least 85.5 kB" in shown["does-not-fit"], shown
        assert span_of(tiny) is None


async def test_layers_beyond_the_quota_are_said_before_anything_is_fetched(
    mesh: Coverage, autojump_clock: MockClock
) -> None:
    (device,) = await mesh.join(memory=ALL, content=ContentSection(replicas=1))
    assert device.store is not None
    device.store.room.quota_bytes = 40_000
    await trio.sleep(15)
    assert "need 305 kB, content.quota is 40 kB; raise content.quota" in codes(device.running)["span-failed"]
    assert device.running.content.bytes_fetched < 10_000, "the manifest, and what is small"
    device.store.room.quota_bytes = 2_000_000
    await mesh.covered(60)
    device.store.room.quota_bytes = 40_000  # lowered: what is here is served as before
    device.engines[-1].lose("it was killed")
    await mesh.world.until(lambda: bool(mesh.holes()))
    await mesh.covered(60)


async def test_a_node_without_memory_serves_nothing(mesh: Coverage, autojump_clock: MockClock) -> None:
    await mesh.join(memory=ALL)
    await mesh.covered(10)
    await trio.sleep(60)
    idle = mesh.world["n1"]
    assert span_of(idle) is None and idle.engines == []
    assert idle.running.placement.prediction is not None


async def test_dead_nodes_are_replaced_by_spare_ones(mesh: Coverage, autojump_clock: MockClock) -> None:
    await mesh.join(4, memory=memory_for(6))
    await mesh.covered(10)
    await trio.sleep(30)
    half = mesh.spans()["n2"]
    await mesh.crash(*(name for name, span in mesh.spans().items() if span == half))
    assert mesh.holes()
    assert await mesh.covered(40) < 4  # SUSPECT_S, DEBOUNCE_S, and loading: nothing is lost by who goes
    assert mesh.voluntary_holes == []


async def test_a_new_release_replaces_the_old_one_whose_sessions_end_first(autojump_clock: MockClock) -> None:
    async with covering(1, first=f"{2 * FACTS.need(0, FACTS.layers)}B") as mesh:
        await mesh.covered(10)
        device = mesh.world["n1"]
        old = device.running.spans.serving
        assert old is not None
        old.enter()
        await mesh.world.publish("n1", ModelSpec(name="other", layers=8, layer_bytes=20_000))
        await mesh.world.until(lambda: span_of(device) == (0, 8), within_s=20)
        assert [engine.rss_bytes > 0 for engine in device.engines] == [True, True]
        old.leave()
        await mesh.world.until(lambda: [engine.rss_bytes > 0 for engine in device.engines] == [False, True])


async def test_without_memory_for_both_the_sessions_of_the_old_span_end_first(autojump_clock: MockClock) -> None:
    async with covering(1, first=ALL) as mesh:
        await mesh.covered(10)
        device = mesh.world["n1"]
        old = device.running.spans.serving
        assert old is not None
        old.enter()
        await mesh.world.publish("n1", ModelSpec(name="other", layers=8, layer_bytes=20_000))
        await mesh.world.until(lambda: device.running.spans.serving is None, within_s=20)
        await trio.sleep(5)
        assert span_of(device) is None and len(device.engines) == 1
        old.leave()
        await mesh.world.until(lambda: span_of(device) == (0, 8), within_s=5)


async def test_a_retired_release_is_no_longer_served(autojump_clock: MockClock) -> None:
    async with covering(1, first=ALL) as mesh:
        await mesh.covered(10)
        node = mesh.world["n1"].running
        head = node.directory.announcement()
        release = node.releases.current
        assert head is not None and release is not None
        node.directory.announce(
            name=head.name, version=head.version, manifest=release.cid, variant=head.variant, retired=True
        )
        await mesh.world.until(lambda: node.spans.serving is None and not node.spans.retiring, within_s=5)
        assert node.releases.current is None
        assert not mesh.world["n1"].engines[0].rss_bytes


async def test_with_memory_for_both_the_old_span_serves_until_the_new_one_is_up(
    mesh: Coverage, autojump_clock: MockClock
) -> None:
    both = f"{2 * FACTS.need(0, FACTS.layers)}B"
    await mesh.join(2, memory=both, layers=6, layer_s=0.016)
    await mesh.covered(10)
    fast = []
    for _ in range(4):
        fast += await mesh.join(memory=both, layers=6, layer_s=0.001)
        await trio.sleep(5)
    assert sorted(span_of(device) or (0, 0) for device in fast) == [(0, 6), (0, 6), (6, 12), (6, 12)]
    left = [device for device in fast if span_of(device) == (0, 6)]
    await mesh.crash(*(device.name for device in fast if device not in left))
    opened = {device.name: device.running.spans.serving for device in left}
    for span in opened.values():
        assert span is not None
        span.enter()
    await mesh.world.until(lambda: any(span_of(device) == (6, 12) for device in left))
    mover = next(device for device in left if span_of(device) == (6, 12))
    assert [engine.rss_bytes > 0 for engine in mover.engines] == [True, True], "its session still runs"
    before = opened[mover.name]
    assert before is not None
    before.leave()
    await mesh.world.until(lambda: [engine.rss_bytes > 0 for engine in mover.engines] == [False, True])
    assert mesh.voluntary_holes == []
    await trio.sleep(120)
    assert sum(span_of(device) == (6, 12) for device in left) == 1, "the other one stays"


async def test_engines_are_ended_with_the_node(autojump_clock: MockClock) -> None:
    async with covering(1, first=ALL) as mesh:
        await mesh.covered(10)
        (engine,) = mesh.world["n1"].engines
        await mesh.crash("n1")
        assert not engine.rss_bytes


@pytest.mark.parametrize("seed", some(range(4), 1))
@pytest.mark.slow
async def test_a_lossy_mesh_never_loses_a_layer_by_a_move(autojump_clock: MockClock, seed: int) -> None:
    """Random limits, loss, delays, crashes and leavers; the mesh heals whenever the survivors can hold the model."""
    rng = random.Random(seed)
    async with covering(seed) as mesh:
        mesh.world.network.set_gossip_loss(rng.choice((0.0, 0.1, 0.3)))
        mesh.world.engine_load_s = rng.choice((1.0, 4.0))
        for _ in range(rng.randrange(5, 9)):
            memory = FACTS.need(0, rng.choice((3, 4, 6))) + rng.randrange(SLACK)
            await mesh.join(memory=f"{memory}B", layer_s=rng.uniform(0.0003, 0.003))
            await trio.sleep(rng.choice((0.05, 0.5, 3.0)))
        await mesh.covered(30)
        for _ in range(3):
            await trio.sleep(rng.choice((20, 40)))
            name = rng.choice(sorted(mesh.spans()))
            if rng.random() < 0.5:
                began = trio.current_time()
                await mesh.world[name].running.placement.drain()
                assert trio.current_time() - began <= 15.1
            await mesh.crash(name)
            if not survivors_fit(mesh):
                break
            # detection 12 s, calm 2 s, and for each of a few moves in a row: wait, fetch and load
            await mesh.covered(45)
        assert mesh.voluntary_holes == []


def survivors_fit(mesh: Coverage) -> bool:
    given = {d.name: int(d.memory.removesuffix("B")) for d in mesh.world.up if d.memory != "0B"}
    return not plan(FACTS, [Node(peer=name, memory_bytes=size) for name, size in given.items()]).holes


@pytest.mark.slow
async def test_both_sides_of_a_partition_cover_themselves_and_find_together(
    mesh: Coverage, autojump_clock: MockClock
) -> None:
    names = [device.name for device in await mesh.join(6, memory=memory_for(6))]
    await mesh.covered(10)
    await trio.sleep(30)
    sides = (names[:3], names[3:])
    mesh.world.split(["n1", *sides[0]], sides[1])
    await trio.sleep(40)
    for side in sides:
        covered = {layer for name in side if name in mesh.spans() for layer in range(*mesh.spans()[name])}
        assert covered == set(range(12)), "each side answers by itself"
    mesh.world.network.heal()
    moves = mesh.moves
    await trio.sleep(60)
    assert not mesh.holes()
    assert mesh.moves - moves <= 4, "meeting again is no reason to reshuffle"
