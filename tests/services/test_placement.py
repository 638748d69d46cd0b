"""The placement service: real services in a simulated mesh, in virtual time."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.model.facts import tight_memory
from protocols.advert.messages import DRAINING, IDLE, SERVING
from protocols.intent.messages import HOLD_MS, Held, Hold
from tests.services.placement_world import MB, World, make_manifest


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery, **settings)
        nursery.cancel_scope.cancel()


async def test_one_node_that_can_serves_everything(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB, everything=True)
        took = await w.covered(10)
        assert member.span == (0, 12)
        assert took < 3
        advert = member.directory.advert
        assert advert.serving is not None
        assert advert.serving.state == SERVING
        assert advert.layer_decode_us > 0
        prediction = member.service.prediction
        assert prediction is not None
        assert prediction.stages == (("a", (0, 12)),)


@pytest.mark.parametrize("nodes", [2, 3, 5, 8])
async def test_a_tight_mesh_covers_soon_after_the_last_join(autojump_clock: MockClock, nodes: int) -> None:
    async with world(seed=nodes) as w:
        share = tight_memory(w.facts, nodes)
        for i in range(nodes):
            await w.join(f"node-{i}", share)
            await trio.sleep(0.2)
        took = await w.covered(6)
        assert len(w.spans()) == nodes
        assert w.moves == 0, "nobody had to move after its first place"
        assert took < 4


@pytest.mark.parametrize("seed", range(6))
async def test_nodes_with_different_limits_that_come_one_by_one(autojump_clock: MockClock, seed: int) -> None:
    """However far apart they come, and with memory that is just enough: covered 10 s after the last one."""
    rng = random.Random(seed)
    async with world(seed=seed, loss=0.05) as w:
        cuts = [0, *sorted(rng.sample(range(1, 12), 4)), 12]
        limits = [w.need(a, b) + rng.randrange(5 * MB) for a, b in itertools.pairwise(cuts)]
        rng.shuffle(limits)
        for i, limit in enumerate(limits):
            await trio.sleep(rng.choice((0.1, 1.0, 8.0)))
            await w.join(f"node-{i}", limit)
        took = await w.covered(20)
        assert took <= 10
        sixth = await w.join("sixth", 60 * MB)
        with trio.fail_after(10):
            await w.until(lambda: sixth.span is not None)
        await trio.sleep(60)
        assert not w.holes()
        assert w.voluntary_holes == []


async def test_each_node_fetches_its_own_layers_only(autojump_clock: MockClock) -> None:
    async with world() as w:
        share = tight_memory(w.facts, 3)
        members = [await w.join(f"node-{i}", share) for i in range(3)]
        await w.covered(10)
        variant = w.manifest.variants["int4"]
        for member in members:
            assert member.span is not None
            wanted = {f.cid for f in variant.groups(*member.span).values()} | {variant.graph.cid}
            assert member.content.held == wanted
            assert list(member.content.pins.values()) == [wanted]


async def test_what_a_span_needs_is_pinned_before_it_is_fetched(autojump_clock: MockClock) -> None:
    """Or else the room for one of its files is made by evicting another one that is here."""
    async with world(bytes_s=MB) as w:
        member = await w.join("a", 500 * MB)
        variant = w.manifest.variants["int4"]
        wanted = {f.cid for f in variant.groups(0, 12).values()} | {variant.graph.cid}
        with trio.fail_after(20):
            while member.spans.loading is None:  # noqa: ASYNC110 virtual time; no event tells
                await trio.sleep(0.1)
        assert not member.content.held
        assert list(member.content.pins.values()) == [wanted]


async def test_a_leaving_node_hands_over_first(autojump_clock: MockClock) -> None:
    async with world() as w:
        for name in ("a", "b", "c"):
            await w.join(name, w.need(0, 6) + 5 * MB)
        await w.covered(10)
        await trio.sleep(20)
        leaver = next(m for m in w.members.values() if sum(s == m.span for s in w.spans().values()) == 1)
        leaver.load.count(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaver.service.drain)
            await trio.sleep(3)
            assert w.state(leaver.peer) == DRAINING
            leaver.load.count(0)
        assert leaver.directory.advert.leaving
        assert not w.holes()
        assert w.voluntary_holes == []


async def test_a_node_that_nobody_can_replace_leaves_when_its_sessions_have_ended(autojump_clock: MockClock) -> None:
    async with world() as w:
        share = tight_memory(w.facts, 2)
        a = await w.join("a", share)
        await w.join("b", share)
        await w.covered(10)
        began = trio.current_time()
        await a.service.drain()
        assert trio.current_time() - began < 2
        assert a.directory.advert.serving is not None
        assert a.directory.advert.serving.state == IDLE


async def test_a_promise_does_not_hold_back_a_node_when_everybody_leaves(autojump_clock: MockClock) -> None:
    async with world() as w:
        share = tight_memory(w.facts, 2)
        a, b = await w.join("a", share), await w.join("b", share)
        await w.covered(10)
        assert a.span is not None and w.head is not None
        first, last = a.span
        hold = Hold(
            manifest=w.head.manifest, variant=w.head.variant, first=first, last=last, epoch=1, hold_ms=HOLD_MS
        )
        assert isinstance(a.service.answer_hold(b.peer, hold), Held)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.service.drain)
            nursery.start_soon(b.service.drain)
        assert trio.current_time() - began < 2


async def test_a_lost_engine_leaves_the_advert_and_comes_back(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB)
        await w.covered(10)
        member.engines[-1].die()
        with trio.fail_after(2):
            await w.until(lambda: bool(w.holes()))
        codes = [shown.code for shown in member.health.current(trio.current_time())]
        assert "engine-restarting" in codes
        assert await w.covered(10) < 5
        assert len(member.engines) == 2


async def test_an_engine_that_does_not_start_is_tried_again(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB)
        member.failing = True
        await trio.sleep(10)
        tries = len(member.engines)
        assert tries >= 2
        assert all(engine.stopped for engine in member.engines)
        shown = {s.code: s.text for s in member.health.current(trio.current_time() + 10)}
        assert "the engine process ended before it was ready" in shown["span-failed"]
        member.failing = False
        await w.covered(60)


async def test_a_model_that_does_not_fit_is_said_with_figures(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", w.need(0, 5))
        tiny = await w.join("b", 5 * MB)
        await trio.sleep(15)
        shown = {s.code: s.text for s in member.health.current()}
        assert "layers 5 to 11 of tiny int4" in shown["not-covered"]
        assert "86.8MB are missing" in shown["not-covered"], shown
        shown = {s.code: s.text for s in tiny.health.current()}
        assert "Raise serve.memory to at least 10.3MB" in shown["does-not-fit"], shown
        assert tiny.span is None


async def test_layers_beyond_the_quota_are_said_before_anything_is_fetched(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB)
        member.content.quota_bytes = 20 * MB
        await trio.sleep(15)
        shown = {s.code: s.text for s in member.health.current(trio.current_time() + 10)}
        assert "layers 0 to 11 need 136MB, content.quota is 20MB; raise content.quota" in shown["span-failed"]
        assert member.content.held == set()
        member.content.quota_bytes = 200 * MB
        await w.covered(60)
        member.content.quota_bytes = 20 * MB  # lowered: what is here is served as before
        member.engines[-1].die()
        await trio.sleep(5)
        await w.covered(60)


async def test_a_node_without_memory_serves_nothing(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 0)
        await w.join("b", 500 * MB)
        await w.covered(10)
        await trio.sleep(60)
        assert member.span is None
        assert member.engines == []
        assert member.service.prediction is not None


async def test_a_dead_node_is_replaced_by_a_spare_one(autojump_clock: MockClock) -> None:
    async with world() as w:
        for i in range(4):
            await w.join(f"node-{i}", w.need(0, 6) + 5 * MB)
        await w.covered(10)
        await trio.sleep(30)
        # Kill both holders of one half.
        half = w.spans()[next(iter(w.members))]
        for peer in [peer for peer, span in w.spans().items() if span == half]:
            w.kill(peer)
        assert w.holes()
        took = await w.covered(40)
        # lease 12 s, slack of the urgent rule 2 s, loading 1 s, and ticks
        assert took < 20, took
        assert w.voluntary_holes == []


async def test_a_new_release_replaces_the_old_one(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB)
        await w.covered(10)
        old = member.spans.engine()
        assert old is not None
        assert w.head is not None
        w.head = type(w.head)(**{**_fields(w.head), "manifest": "bafyother", "sequence": 2})
        w.manifest = make_manifest(8)
        member.directory.changes.notify()
        with trio.fail_after(20):
            await w.until(lambda: (s := member.spans.engine()) is not None and s.span.manifest == "bafyother")
        stage = member.spans.engine()
        assert stage is not None
        assert (stage.span.first, stage.span.last) == (0, 8)
        await trio.sleep(2)
        assert member.engines[0].stopped
        assert not member.engines[1].stopped


async def test_a_retired_release_is_no_longer_served(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB)
        await w.covered(10)
        w.head = None
        member.directory.changes.notify()
        with trio.fail_after(5):
            await w.until(lambda: member.spans.engine() is None)
        await trio.sleep(2)
        assert member.engines[0].stopped


async def test_an_old_span_ends_only_after_its_sessions(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB)
        await w.covered(10)
        stage = member.spans.engine()
        assert stage is not None
        stage.enter()
        w.head = None
        member.directory.changes.notify()
        await trio.sleep(10)
        assert not member.engines[0].stopped
        stage.leave()
        await trio.sleep(2)
        assert member.engines[0].stopped


async def test_with_memory_for_both_the_old_span_serves_until_the_new_one_is_up(autojump_clock: MockClock) -> None:
    async with world() as w:
        for i in range(2):
            await w.join(f"slow-{i}", 500 * MB, max_layers=6, layer_us=16_000)
        await w.covered(10)
        for i in range(4):
            await w.join(f"fast-{i}", 500 * MB, max_layers=6, layer_us=1000)
            await trio.sleep(5)
        fast = [m for m in w.members.values() if m.peer.startswith("fast")]
        assert sorted(m.span or (0, 0) for m in fast) == [(0, 6), (0, 6), (6, 12), (6, 12)]
        left = [m for m in fast if m.span == (0, 6)]
        for member in fast:
            if member not in left:
                w.kill(member.peer)
        stages = {m.peer: m.spans.engine() for m in left}
        for stage in stages.values():
            assert stage is not None
            stage.enter()
        with trio.fail_after(120):
            await w.until(lambda: any(m.span == (6, 12) for m in left))
        mover = next(m for m in left if m.span == (6, 12))
        assert [engine.stopped for engine in mover.engines] == [False, False], "its session still runs"
        stage = stages[mover.peer]
        assert stage is not None
        stage.leave()
        await trio.sleep(2)
        assert [engine.stopped for engine in mover.engines] == [True, False]
        assert w.voluntary_holes == []
        assert list(mover.content.pins) == ["span-1"]
        await trio.sleep(120)
        assert sum(m.span == (6, 12) for m in left) == 1, "the other one stays"


async def test_engines_are_ended_with_the_service(autojump_clock: MockClock) -> None:
    async with world() as w:
        member = await w.join("a", 500 * MB)
        await w.covered(10)
        member.scope.cancel()
        await trio.sleep(1)
        assert member.engines[0].stopped


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}
