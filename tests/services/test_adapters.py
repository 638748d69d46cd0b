"""Adapters in a mesh: who answers with which, what is fetched and kept, and what is refused."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined
from meshnode.model.adapter_file import write_layer
from protocols.adapter.manifest import decode_adapter, encode_adapter
from protocols.delta.frame import Frame, Target, encode_frame
from protocols.ids import DAG_CBOR, RAW, Cid, cid_of
from protocols.manifest.messages import FileRef
from tests.adapters import random_pairs
from tests.adverts import MANIFEST, OTHER_MANIFEST
from tests.services.pipe_mesh import Member, Mesh, alone, open_mesh

FRAME = Frame(
    base=MANIFEST,
    rank=2,
    alpha=4,
    targets=(Target("q_proj", 8, 8), Target("v_proj", 8, 4)),
    first=2,
    last=8,
    seed=1,
)


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with open_mesh() as made:
        yield made


def answer(
    mesh: Mesh, adapter: Cid | str | None, prompt: tuple[int, ...] = (5, 6, 7, 8, 9), most: int = 12
) -> list[int]:
    """What one process says."""
    return alone(prompt, most=most, adapter=mesh.content.whole(FRAME, Cid(adapter)) if adapter else None)


@pytest.mark.parametrize("cuts", [(), (3, 6), (1, 2, 8)])
async def test_a_chain_with_an_adapter_gives_the_tokens_of_one_process(
    mesh: Mesh, cuts: tuple[int, ...], autojump_clock: MockClock
) -> None:
    asker = await mesh.chain(*cuts)
    adapter = mesh.content.build(FRAME, 1)
    receipt = await asker.ask(adapter=adapter)
    assert receipt.tokens == answer(mesh, adapter) != alone()
    assert receipt.adapter == adapter
    plain = await asker.ask(adapter="")
    assert plain.tokens == alone()
    assert plain.adapter == ""
    await mesh.freed()


async def test_a_stage_fetches_the_files_of_its_layers_alone(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(2, 4)  # the adapter begins at layer 2
    adapter = mesh.content.build(FRAME, 1)
    await asker.ask(adapter=adapter)
    first, second, third = (member.local for member in mesh.members[:3])
    assert (first.adapters, second.adapters, third.adapters) == ([], [adapter], [adapter])
    files = decode_adapter(mesh.content.held[adapter]).layers
    fetched = [cid for cid in mesh.content.asked if cid in {file.cid for file in files}]
    assert sorted(fetched) == sorted(file.cid for file in files), "every file once, by the stage of its layer"


async def test_the_released_one_answers_and_is_there_before(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    assert (await asker.ask()).tokens == alone()
    adapter = mesh.content.build(FRAME, 1)
    mesh.released.release(adapter)
    await trio.sleep(1)
    assert all(adapter in member.local.adapters for member in mesh.members[:3])
    receipt = await asker.ask()
    assert (receipt.tokens, receipt.adapter) == (answer(mesh, adapter), adapter)
    assert (await asker.ask(adapter="")).tokens == alone()
    mesh.released.release(None)
    assert (await asker.ask()).tokens == alone()
    assert all(member.local.adaptations <= 1 for member in mesh.members[:3])
    await mesh.freed()


async def test_a_swap_under_load_mixes_no_answer(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    adapters = [mesh.content.build(FRAME, seed) for seed in range(4)]
    rng = random.Random(7)
    seen: set[str] = set()

    async def ask(number: int) -> None:
        prompt = tuple(rng.randrange(3, 200) for _ in range(5))
        await trio.sleep(number * 0.011)
        receipt = await asker.ask(prompt, most=8)
        assert receipt.tokens == answer(mesh, receipt.adapter, prompt, 8), (number, receipt.adapter)
        seen.add(receipt.adapter)

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(ask, number)
        for adapter in adapters:
            await trio.sleep(0.02)
            mesh.released.release(adapter)
    assert len(seen) > 1, "all sessions were of one adapter: nothing was swapped under them"
    await mesh.freed()


async def test_two_who_want_it_fetch_it_once(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain()
    adapter = mesh.content.build(FRAME, 1)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: asker.ask(adapter=adapter))
    engine = mesh.members[0].local
    assert (engine.adaptations, engine.adapters) == (1, [adapter])


async def test_few_of_those_that_nobody_uses_are_kept(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain()
    adapters = [mesh.content.build(FRAME, seed) for seed in range(5)]
    mesh.released.release(adapters[0])
    for adapter in (*adapters, adapters[3]):
        await asker.ask(most=2, adapter=adapter)
    await mesh.freed()
    engine = mesh.members[0].local
    assert sorted(engine.adapters) == sorted((adapters[0], adapters[3], adapters[4]))
    assert engine.adaptations == 5
    assert (await asker.ask(adapter=adapters[1])).tokens == answer(mesh, adapters[1])


async def test_an_adapter_that_takes_its_time_to_come_is_waited_for(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain()
    adapter = mesh.content.build(FRAME, 1)
    mesh.content.held_up = trio.Event()
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            assert (await asker.ask(adapter=adapter)).tokens == answer(mesh, adapter)

        nursery.start_soon(ask)
        await trio.sleep(8)
        mesh.content.held_up.set()
    assert mesh.content.asked.count(adapter) == 1, "it was given up and asked for again"


async def test_an_asker_who_leaves_while_it_is_fetched(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain()
    adapter = mesh.content.build(FRAME, 1)
    mesh.content.held_up = trio.Event()
    with trio.move_on_after(1):
        await asker.ask(adapter=adapter)
    await mesh.freed()
    mesh.content.held_up.set()
    assert (await asker.ask(adapter=adapter)).tokens == answer(mesh, adapter)


# ---------------------------------------------------------------- refusals


async def refused(asker: Member, adapter: str, code: str, words: str) -> None:
    with pytest.raises(Declined, match=words) as caught:
        await asker.ask(adapter=adapter)
    assert caught.value.code == code


async def test_what_can_not_be_used(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    content = mesh.content
    good = decode_adapter(content.held[content.build(FRAME, 1)])

    def other(**changes: object) -> Cid:
        return content.put_block(encode_adapter(replace(good, **changes)), DAG_CBOR)  # type: ignore[arg-type]

    def with_frame(frame: Frame) -> Cid:
        shape = content.put_block(encode_frame(frame), DAG_CBOR)
        layers = good.layers[: frame.last - frame.first]
        return other(base=frame.base, frame=shape, first=frame.first, layers=layers)

    def with_file(data: bytes) -> Cid:
        content.held[cid_of(RAW, data)] = data
        layers = (*good.layers[:-1], FileRef(cid=cid_of(RAW, data), size=len(data)))
        return other(layers=layers)

    damaged = bytearray(content.held[good.layers[-1].cid])
    damaged[-1:] = b""
    await refused(asker, "nonsense", "bad-adapter", "'nonsense' is not the CID of an adapter")
    await refused(asker, good.layers[0].cid, "bad-adapter", "is not the CID of an adapter")
    await refused(asker, MANIFEST, "no-adapter", "can't be fetched: nobody gave it")
    await refused(asker, good.frame, "bad-adapter", "manifest of an adapter can't be used")
    await refused(asker, other(frame=MANIFEST), "no-adapter", "nobody gave it")
    await refused(asker, with_frame(replace(FRAME, base=OTHER_MANIFEST)), "bad-adapter", "was made for the release")
    await refused(asker, other(first=1), "bad-adapter", "its frame is of 2 to 7")
    await refused(asker, with_frame(replace(FRAME, rank=65)), "bad-adapter", "up to rank 64")
    await refused(asker, with_frame(replace(FRAME, rank=1)), "bad-adapter", "not of rank 1")
    await refused(
        asker, with_frame(replace(FRAME, targets=(Target("q_proj", 8, 16),))), "bad-adapter", "it has 8 and 8"
    )
    await refused(asker, with_frame(replace(FRAME, first=4, last=10)), "bad-adapter", "the model has 9")
    await refused(asker, with_file(bytes(damaged)), "bad-adapter", "file of layer 7 of the adapter can't be used")
    await refused(asker, with_file(b"nonsense"), "bad-adapter", "file of layer 7 .* no safetensors file")
    await refused(
        asker, with_file(write_layer(random_pairs(1, 0))), "bad-adapter", "a layer of .* bytes; with its frame"
    )
    missing = FileRef(cid=cid_of(RAW, b"gone"), size=100)
    await refused(asker, other(layers=(*good.layers[:-1], missing)), "no-adapter", "nobody gave it")
    assert (await asker.ask()).tokens == alone(), "none of them harms the next question"
    await mesh.freed()
    assert mesh.members[2].local.adapters == [], "of two, the last layer was damaged"


async def test_one_stage_without_it_is_avoided(mesh: Mesh, autojump_clock: MockClock) -> None:
    """A stage whose disk is full, say: the other one that serves the same layers answers."""
    adapter = mesh.content.build(FRAME, 1)
    asker = await mesh.chain()
    broken = mesh.members[0]
    whole = await mesh.start(0, 9)
    mesh.prefer = broken.peer

    async def none(*_: object, **__: object) -> None:
        raise Declined("no-adapter", "the adapter can't be fetched: the disk is full")

    broken.local.adapt = none  # type: ignore[method-assign]
    receipt = await asker.ask(adapter=adapter)
    assert [hop.peer for hop in receipt.route] == [whole.peer]
    assert receipt.tokens == answer(mesh, adapter)
