"""Prompts that begin like one before: through real stage services and pipes, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined
from meshnode.services.inference.receipt import Piece, Receipt, Request
from protocols.delta.frame import Frame, Target
from protocols.pipe.messages import Sampling
from tests.adverts import MANIFEST
from tests.services.pipe_mesh import GREEDY, Member, Mesh, alone, open_mesh

FRAME = Frame(
    base=MANIFEST, rank=2, alpha=4, targets=(Target("q_proj", 8, 8), Target("v_proj", 8, 4)), first=4, last=8, seed=1
)
FIRST = tuple(3 + i * 7 % 200 for i in range(100))
DRAWN = Sampling(seed=11, temperature_milli=900, repetition_milli=1100)


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with open_mesh() as made:
        yield made


@pytest.fixture
async def asker(mesh: Mesh) -> Member:
    """Serves nothing; the first three members serve three layers each, and have answered `FIRST`."""
    made = await mesh.chain(3, 6)
    receipt = await made.ask(FIRST, most=8)
    assert receipt.cached == 0
    await mesh.freed()
    return made


def turn(receipt: Receipt) -> tuple[int, ...]:
    """The next turn of a conversation: what was asked, what was answered, and something new."""
    return (*receipt.prompt, *receipt.tokens, 9, 9, 9)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
async def test_the_next_turn_runs_only_what_is_new(mesh: Mesh, sampling: Sampling, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    receipt, turns = await asker.ask(FIRST, most=8, sampling=sampling), 0
    while len(prompt := turn(receipt)) < 150:
        await mesh.freed()
        for member in mesh.members[:3]:
            member.local.steps.clear()
        receipt = await asker.ask(prompt, most=8, sampling=sampling)
        assert receipt.cached == len(FIRST) + 11 * turns, "the whole prompt before, but not its answer"
        assert receipt.tokens == alone(prompt, most=8, sampling=sampling)
        for member in mesh.members[:3]:
            assert member.local.steps[0] == (receipt.cached, len(prompt) - receipt.cached)
            assert len(member.local.steps) == len(receipt.tokens)
        turns += 1
    assert turns > 3


async def test_the_same_question_runs_its_last_token_alone(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    again = await asker.ask(FIRST, most=8)
    assert (again.cached, again.tokens) == (len(FIRST) - 1, alone(FIRST, most=8))
    other = (*FIRST[:70], *FIRST[71:], 5, 5)
    await mesh.freed()
    third = await asker.ask(other, most=8)
    assert (third.cached, third.tokens) == (64, alone(other, most=8)), "a border before where they part"
    await mesh.freed()
    assert (await asker.ask((4, *FIRST), most=8)).cached == 0


async def test_what_one_node_asked_is_no_help_to_another(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    """Nor to whom else the same node asks for: the time of a first token must not tell what others have asked."""
    assert (await mesh.members[0].ask(FIRST)).cached == 0
    stranger = await mesh.start()
    assert (await stranger.ask(FIRST)).cached == 0
    await mesh.freed()

    async def cached(who: str) -> int:
        pieces = asker.origin.generate(Request(FIRST, 2, GREEDY, asker=who))
        receipts = [piece async for piece in pieces if isinstance(piece, Receipt)]
        await mesh.freed()
        return receipts[0].cached

    assert [await cached(who) for who in ("ann", "bob", "ann", "bob", "")] == [0, 0, 99, 99, 99]


async def test_a_copied_name_opens_nothing(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    """Whoever guesses the prompt of another node names its beginnings exactly as that one did."""
    guesser = mesh.members[2]
    guesser.origin._kept = asker.origin._kept
    assert (await guesser.ask(FIRST)).cached == 0
    await mesh.freed()
    assert (await guesser.ask(FIRST)).cached == 99


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_all_stages_or_none(mesh: Mesh, asker: Member, number: int, autojump_clock: MockClock) -> None:
    """A stage whose engine was started anew has nothing; the others run the whole prompt, too."""
    fresh = mesh.members[number].local
    fresh._sessions.kept.shrink(0)
    for member in mesh.members[:3]:
        member.local.steps.clear()
    receipt = await asker.ask(FIRST, most=8)
    assert (receipt.cached, receipt.tokens) == (0, alone(FIRST, most=8))
    assert all(member.local.steps[0] == (0, 100) for member in mesh.members[:3])
    await mesh.freed()
    assert (await asker.ask(FIRST, most=8)).cached == 99


async def test_the_least_that_a_stage_has_counts(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    longer = (*FIRST, *range(3, 60))
    await asker.ask(longer, most=2)
    await mesh.freed()
    kept = mesh.members[1].local._sessions.kept
    (prompt,) = kept._prompts
    prompt.prefixes = {name: tokens for name, tokens in prompt.prefixes.items() if tokens <= 100}
    receipt = await asker.ask((*longer, 7), most=8)
    assert (receipt.cached, receipt.tokens) == (100, alone((*longer, 7), most=8))


async def test_another_stage_in_the_route_has_other_rows(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    """The stages behind it don't use what they have kept: it came through the one before."""
    before = mesh.members[0]
    before.kill()
    await mesh.start(0, 3)
    before.span = None
    receipt = await asker.ask(FIRST, most=8)
    assert (receipt.cached, receipt.tokens) == (0, alone(FIRST, most=8))
    assert all(member.local.steps[-8] == (0, 100) for member in mesh.members[1:3])


async def test_the_route_that_has_the_prompt_is_taken(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    """Of two nodes with the same layers, the one that has kept the prompt is asked, whatever is drawn."""
    await mesh.start(0, 3)
    for number in range(12):
        receipt = await asker.ask((*FIRST, 5 + number), most=2)
        assert receipt.cached == 100, number
        assert receipt.route[0].peer == mesh.members[0].peer
        await mesh.freed()
    starts = {(await asker.ask((7, number + 3, *FIRST), most=1)).route[0].peer for number in range(12)}
    assert len(starts) == 2, "other questions go to both"


async def test_an_answer_that_was_broken_off_is_kept_as_far_as_it_came(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    with trio.CancelScope() as scope:
        async for piece in asker.origin.generate(Request(FIRST, 50, GREEDY)):
            if isinstance(piece, Piece):
                scope.cancel()
    await mesh.freed()
    receipt = await asker.ask(FIRST, most=8)
    assert (receipt.cached, receipt.tokens) == (99, alone(FIRST, most=8))


async def test_rows_that_a_broken_answer_leaves_are_dropped(mesh: Mesh, autojump_clock: MockClock) -> None:
    """Whatever went wrong may have been wrong before."""
    asker = await mesh.chain(3, 6)
    mesh.members[2].local.dies_after = 2
    with pytest.raises(Declined, match="SIGKILL"):
        await asker.ask(FIRST, most=8)
    await mesh.freed()
    assert [member.local.kept_bytes for member in mesh.members[:2]] == [0, 0]


async def test_each_adapter_has_rows_of_its_own(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    """Also a stage whose layers it does not change: what comes in there is another thing."""
    one, other = (mesh.content.build(FRAME, seed) for seed in (1, 2))
    for cached in (0, 99):
        for adapter in (one, other):
            receipt = await asker.ask(FIRST, most=8, adapter=adapter)
            assert receipt.cached == cached
            assert receipt.tokens == alone(FIRST, most=8, adapter=mesh.content.whole(FRAME, adapter))
            await mesh.freed()
    plain = await asker.ask(FIRST, most=8, adapter="")
    assert (plain.cached, plain.tokens) == (99, alone(FIRST, most=8))


async def test_pooled_prompts_leave_nothing(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    before = [member.local.kept_bytes for member in mesh.members[:3]]
    assert all(before)
    vector = await asker.embed(FIRST)
    async with open_mesh() as other:
        assert await (await other.chain()).embed(FIRST) == vector
    assert [member.local.kept_bytes for member in mesh.members[:3]] == before


async def test_a_node_may_keep_nothing(autojump_clock: MockClock) -> None:
    async with open_mesh() as mesh:
        asker = await mesh.chain(3, 6)
        mesh.members[1].stage._prefix_cache = False
        for _ in range(2):
            assert (await asker.ask(FIRST, most=4)).cached == 0
            await mesh.freed()
        assert [member.local.kept_bytes > 0 for member in mesh.members[:3]] == [True, False, True]


async def test_a_full_memory_keeps_the_prompt_that_goes_on(autojump_clock: MockClock) -> None:
    """Where a session and what it begins with have no room beside each other, it takes the rows with it."""
    async with open_mesh() as mesh:
        for first, last in ((0, 3), (3, 6), (6, 9)):
            await mesh.start(first, last, max_kv_bytes=3 * 2 * 4 * 4 * 170)
        asker = await mesh.start()
        receipt, cached = await asker.ask(FIRST, most=8), 0
        for _ in range(4):
            await mesh.freed()
            cached = len(receipt.prompt)
            prompt = turn(receipt)
            receipt = await asker.ask(prompt, most=8)
            assert (receipt.cached, receipt.tokens) == (cached, alone(prompt, most=8))
        await mesh.freed()
        other = (4, *FIRST, *FIRST[:50])
        assert (await asker.ask(other, most=8)).tokens == alone(other, most=8), "nothing is in its way"
        await mesh.freed()
        assert (await asker.ask(receipt.prompt, most=8)).cached == 0


async def test_a_stage_that_is_replaced_midway_leaves_the_rows_of_the_new_route(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    """A turn that loses a stage begins with what was kept, goes on without it, and is kept on its new route."""
    lost, spare = mesh.members[1], await mesh.start(3, 6)
    prompt = (*FIRST, 9, 9)

    def kill(count: int) -> None:
        if count == 3:
            lost.kill()
            lost.span = None

    receipt = await asker.ask(prompt, most=8, each=kill)
    assert receipt.tokens == alone(prompt, most=8)
    assert (receipt.cached, len(receipt.replaced)) == (100, 1)
    assert receipt.route[1].peer == spare.peer
    await mesh.freed()
    later = turn(receipt)
    again = await asker.ask(later, most=8)
    assert (again.cached, again.route) == (len(prompt), receipt.route)
    assert again.tokens == alone(later, most=8)
