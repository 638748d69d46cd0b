"""Where the files of a model are: copies that are made and made again, a provider with a damaged disk."""

from __future__ import annotations

import os
from pathlib import Path

from trio.testing import MockClock

from meshnode.api.status import status_of
from meshnode.config.settings import ContentSection
from meshnode.sim.model import ModelSpec, make_model
from meshnode.sim.world import Device, World, give
from protocols.ids import Cid, short

ONE_COPY = ContentSection(replicas=1)
SMALL = ModelSpec(layers=8, layer_bytes=1 << 18)


def held(device: Device) -> frozenset[Cid]:
    assert device.store is not None
    return device.store.files()


def enough(world: World) -> bool:
    """Whether every node that runs has counted two copies of everything."""
    counts = [device.running.replication.copies() for device in world.up]
    return all(
        count is not None and count.nodes == len(counts) and count.fewest >= 2 and not count.short for count in counts
    )


def damage(folder: Path) -> None:
    """Flip a bit in every file that is large, as a failing disk does: no time stamp tells."""
    for path in folder.iterdir():
        before = path.stat()
        if before.st_size > 100_000:
            data = bytearray(path.read_bytes())
            data[1000] ^= 1
            path.chmod(0o600)
            path.write_bytes(data)
            path.chmod(before.st_mode)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_every_file_has_two_copies_and_has_them_again_after_a_death(
    world: World, autojump_clock: MockClock
) -> None:
    publisher, *others = world.add(3, memory="1.4MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(lambda: world.all_ready() and enough(world))
    copies = status_of(publisher.running).copies
    assert copies is not None and copies.groups.keys() >= {"tokenizer.json", "graph", "embed", "layer.23", "head"}
    right, files = await world.ask("n1"), held(publisher)
    assert held(others[0]) | held(others[1]) == files, "the publisher is not needed any more"
    await world.crash("n1")
    await world.until(lambda: len(world.up) == 2 and enough(world))
    assert [held(device) for device in others] == [files, files]
    others[0].memory = "8MB"  # enough for all layers
    await world.crash("n2")
    await world.start("n2")
    await world.until(world.all_ready)
    assert await world.ask("n2") == await world.ask("n3") == right


async def test_a_publisher_that_leaves_at_once_leaves_the_model_behind(
    world: World, autojump_clock: MockClock
) -> None:
    """Before any copy was due: what only it holds is handed over while it stops."""
    publisher, other = world.add(2, memory="8MB", content=ONE_COPY)
    await world.start_all()
    await world.publish("n1", SMALL)
    await world.until(world.all_ready)
    right, files = await world.ask("n2"), held(publisher)
    await world.leave("n1")
    assert held(other) == files
    await world.until(world.all_ready)
    assert await world.ask("n2") == right


async def test_a_provider_with_a_damaged_disk(world: World, autojump_clock: MockClock) -> None:
    """It is dropped and named; what it sent is not believed, and the next provider gives all."""
    bad, good = world.add(2, memory="0", content=ONE_COPY)
    third, *_ = world.add(1, memory="8MB", content=ONE_COPY)
    await world.start("n1", "n2")
    model = make_model(SMALL, bad.identity.signing_key, world.wall())
    cid = await world.publish("n1", SMALL)
    assert good.store is not None
    assert give(good.store, model, good.folder) == cid
    await world.crash("n2")
    damage(bad.folder / "files")
    await world.start("n3")
    await world.until(lambda: bool(third.running.content.bad_providers()))
    assert list(third.running.content.bad_providers()) == [bad.peer_id]
    [entry] = [entry for entry in third.running.health.current() if entry.code == "bad-provider"]
    assert f"n1 ({short(bad.peer_id)})" in entry.text and "meshnode model verify" in entry.text
    assert not third.running.readiness.now.ready
    await world.start("n2")
    await world.until(world.all_ready)
    assert list(third.running.content.bad_providers()) == [bad.peer_id]
    store = third.store
    assert store is not None and all(store.sound(file) for file in held(third) - {cid})
    assert len(await world.ask("n1")) == 12
