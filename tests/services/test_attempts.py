"""Answers that lose stages and go on: word for word what they would have been, in virtual time."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.services.inference.attempts import FRUITLESS, HEAL_S
from meshnode.services.inference.receipt import Piece, Receipt, Request, Taken, Waiting
from protocols.pipe.messages import Grammar, Sampling
from tests.services.pipe_mesh import GREEDY, LAYERS, RELEASE, Member, Mesh, alone, open_mesh
from tests.services.test_origin import DRAWN, serve_letters

CUTS = (0, 3, 6, LAYERS)
SPANS = tuple(pairwise(CUTS))
PROMPT = (5, 6, 7, 8, 11)
MOST = 40  # tokens, which this prompt gets, greedy and drawn


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with open_mesh() as made:
        yield made


@pytest.fixture
async def asker(mesh: Mesh) -> Member:
    """Serves nothing; two members serve each of three spans."""
    for _ in range(2):
        for span in SPANS:
            await mesh.start(*span)
    return await mesh.start()


def kill(mesh: Mesh, asker: Member, index: int) -> None:
    """The node that computes this stage of the answer under way."""
    (generation,) = asker.origin._running.values()
    peer = generation.receipt.route[index].peer
    next(member for member in mesh.members if member.peer == peer).kill()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("after", [1, 2, 35])
@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_stage_that_dies_is_replaced(
    mesh: Mesh, asker: Member, index: int, after: int, sampling: Sampling, autojump_clock: MockClock
) -> None:
    receipt = await asker.ask(
        PROMPT, most=MOST, sampling=sampling, each=lambda count: kill(mesh, asker, index) if count == after else None
    )
    assert receipt.tokens == alone(PROMPT, most=MOST, sampling=sampling)
    (replaced,) = receipt.replaced
    assert replaced.hop is not None and (replaced.hop.first, replaced.hop.last) == SPANS[index]
    assert after <= replaced.tokens <= MOST
    assert replaced.back_at is not None and replaced.lost_at < replaced.back_at < replaced.lost_at + 1
    assert replaced.hop.peer in replaced.reason
    assert all(hop.peer != replaced.hop.peer for hop in receipt.route)
    assert len(receipt.arrivals) == len(receipt.hop_times) == len(receipt.return_us) == len(receipt.tokens)
    await mesh.freed()


@pytest.mark.parametrize("indices", [(0, 1), (1, 2), (0, 1, 2)])
async def test_stages_that_die_together_are_replaced(
    mesh: Mesh, asker: Member, indices: tuple[int, ...], autojump_clock: MockClock
) -> None:
    def each(count: int) -> None:
        if count == 7:
            for index in indices:
                kill(mesh, asker, index)

    receipt = await asker.ask(PROMPT, most=MOST, sampling=DRAWN, each=each)
    assert receipt.tokens == alone(PROMPT, most=MOST, sampling=DRAWN)
    assert 1 <= len(receipt.replaced) <= len(indices)
    await mesh.freed()


async def test_one_stage_after_the_other_is_replaced(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    receipt = await asker.ask(
        PROMPT,
        most=MOST,
        sampling=DRAWN,
        each=lambda n: kill(mesh, asker, n // 10 - 1) if n in (10, 20, 30) else None,
    )
    assert receipt.tokens == alone(PROMPT, most=MOST, sampling=DRAWN)
    assert [replaced.hop and replaced.hop.first for replaced in receipt.replaced] == [0, 3, 6]
    assert 10 <= receipt.replaced[0].tokens <= receipt.replaced[1].tokens <= receipt.replaced[2].tokens
    assert len(receipt.hops()) == 3
    await mesh.freed()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("steps", [1, 3])
async def test_a_stage_that_dies_while_it_reads_the_prompt_is_replaced(
    mesh: Mesh, asker: Member, index: int, steps: int, autojump_clock: MockClock
) -> None:
    prompt = tuple(3 + i % 200 for i in range(50))
    for member in mesh.members[:6]:
        member.local.tampers = killing(mesh, asker, member, steps, index)
    receipt = await asker.ask(prompt, most=10, sampling=DRAWN, chunk_rows=10)
    assert receipt.tokens == alone(prompt, most=10, sampling=DRAWN)
    assert [replaced.tokens for replaced in receipt.replaced] == [0]
    await mesh.freed()


async def test_a_stage_that_dies_while_it_runs_a_replay_is_replaced(mesh: Mesh, autojump_clock: MockClock) -> None:
    for _ in range(3):
        for span in SPANS:
            await mesh.start(*span)
    asker = await mesh.start()
    killed: list[Member] = []

    def each(count: int) -> None:
        if count != 20 or killed:
            return
        kill(mesh, asker, 0)
        for member in mesh.members[:-1]:
            begun = len(member.local.steps)

            def dies(result: object, member: Member = member, begun: int = begun) -> object:
                again = [step for step in member.local.steps[begun:] if step[1] > 1]
                if len(killed) < 1 and member.span == mesh.members[1].span and len(again) == 2:
                    killed.append(member)
                    member.kill()
                return result

            member.local.tampers = dies  # type: ignore[assignment]

    receipt = await asker.ask(PROMPT, most=MOST, sampling=DRAWN, each=each)
    assert receipt.tokens == alone(PROMPT, most=MOST, sampling=DRAWN)
    assert len(killed) == 1
    assert [replaced.hop and replaced.hop.first for replaced in receipt.replaced] == [0, 3]
    assert receipt.replaced[0].tokens == receipt.replaced[1].tokens
    assert receipt.replaced[0].back_at == receipt.replaced[1].back_at
    await mesh.freed()


def killing(mesh: Mesh, asker: Member, member: Member, steps: int, index: int) -> Callable[..., object]:
    """Kills the stage of this index when a node has run so many steps; what came of a step is left as it is."""

    def tampers(result: object) -> object:
        if len(member.local.steps) == steps and not any(other.scope.cancel_called for other in mesh.members):
            (generation,) = asker.origin._running.values()
            if generation.receipt.route[index].peer == member.peer:
                member.kill()
        return result

    return tampers


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_an_engine_that_dies_is_replaced(
    mesh: Mesh, asker: Member, index: int, autojump_clock: MockClock
) -> None:
    def each(count: int) -> None:
        if count == 5:
            (generation,) = asker.origin._running.values()
            peer = generation.receipt.route[index].peer
            local = next(member.local for member in mesh.members if member.peer == peer)
            local.dies_after = len(local.steps)

    receipt = await asker.ask(PROMPT, most=MOST, sampling=DRAWN, each=each)
    assert receipt.tokens == alone(PROMPT, most=MOST, sampling=DRAWN)
    assert "the engine of" in receipt.replaced[0].reason
    await mesh.freed()


async def test_a_link_that_breaks_is_gone_around(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    def each(count: int) -> None:
        if count == 3:
            (generation,) = asker.origin._running.values()
            one, other, _ = generation.receipt.route
            mesh.network.partition([one.peer], [other.peer])  # type: ignore[list-item]

    receipt = await asker.ask(PROMPT, most=MOST, each=each)
    assert receipt.tokens == alone(PROMPT, most=MOST)
    assert "could not be reached from the stage before it" in receipt.replaced[0].reason
    await mesh.freed()


async def test_an_answer_with_a_form_goes_on_in_it(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    letters = serve_letters(mesh)
    form = Grammar(kind="regex", text=b"(red|green|blue) [0-9]{12}")
    hot = replace(DRAWN, temperature_milli=1500)
    right = (await asker.ask(PROMPT, most=30, sampling=hot, grammar=form)).tokens
    for index in (2, 0):
        receipt = await asker.ask(
            PROMPT,
            most=30,
            sampling=hot,
            grammar=form,
            each=lambda count, index=index: kill(mesh, asker, index) if count == 6 else None,  # type: ignore[misc]
        )
        assert receipt.tokens == right
        assert len(receipt.replaced) == 1
        assert re.fullmatch("(red|green|blue) [0-9]{12}", letters.decode(receipt.tokens))
    await mesh.freed()


async def test_a_vector_is_asked_for_again(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    right = await asker.embed()
    for member in mesh.members[:6]:
        member.local.steps.clear()
        member.local.tampers = killing(mesh, asker, member, 1, 1)  # type: ignore[assignment]
    assert await asker.embed() == right
    assert any(member.scope.cancel_called for member in mesh.members)
    await mesh.freed()


async def test_likelihoods_are_told_once_for_each_token(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    async def said(index: int | None) -> list[object]:
        out: list[object] = []
        async with aclosing(asker.origin.generate(Request(PROMPT, MOST, DRAWN))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Piece):
                    out.append((piece.token, piece.chances))
                    if len(out) == 9 and index is not None:
                        kill(mesh, asker, index)
                elif not isinstance(piece, Receipt):
                    out.append(piece)
        return out

    right = await said(None)
    assert isinstance(right[0], Taken) and len(right) == MOST + 1
    assert await said(2) == right, "the stages take it twice, its asker hears that once"


# ---------------------------------------------------------------- nobody else


async def test_an_answer_waits_for_who_takes_over(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    notices: list[str] = []
    tokens: list[int] = []

    async def take_over() -> None:
        await trio.sleep(20)
        mesh.members[1].span = None
        mesh.changes.notify()
        await trio.sleep(20)
        await mesh.start(3, 6)
        mesh.changes.notify()

    async with (
        trio.open_nursery() as nursery,
        aclosing(asker.origin.generate(Request(PROMPT, MOST, DRAWN))) as pieces,
    ):
        async for piece in pieces:
            match piece:
                case Waiting(why):
                    notices.append(why)
                case Piece(token):
                    tokens.append(token)
                    if len(tokens) == 5:
                        kill(mesh, asker, 1)
                        nursery.start_soon(take_over)
                case Receipt():
                    receipt = piece
    assert tokens == receipt.tokens == alone(PROMPT, most=MOST, sampling=DRAWN)
    (notice,) = notices
    assert re.match("layers 3 to 5 are held only by peers that failed a moment ago .*; the answer waits for", notice)
    (replaced,) = receipt.replaced
    assert replaced.back_at is not None and 40 <= replaced.back_at - replaced.lost_at < 41
    await mesh.freed()


async def test_without_a_holder_the_layers_are_named(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    died = 0.0

    def each(count: int) -> None:
        nonlocal died
        if count == 5:
            died = trio.current_time()
            kill(mesh, asker, 2)
            mesh.members[2].span = None
            mesh.changes.notify()

    with pytest.raises(PeerUnreachable) as caught:
        await asker.ask(PROMPT, most=MOST, each=each)
    assert HEAL_S <= trio.current_time() - died < HEAL_S + 1
    assert re.search(
        r"runs layers 6 to 8, went away: .*; the answer could not go on within 60 s: layers 6 to 8 are held by nob",
        str(caught.value),
    )
    assert caught.value.peer == mesh.members[2].peer
    await mesh.freed()


async def test_the_same_node_is_asked_again_where_there_is_no_other(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    local = mesh.members[1].local

    def each(count: int) -> None:
        if count == 5:
            local.dies_after = len(local.steps)

    async def recover() -> None:
        await trio.sleep(3)
        local.dies_after = None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(recover)
        receipt = await asker.ask(PROMPT, most=MOST, each=each)
    assert receipt.tokens == alone(PROMPT, most=MOST)
    assert 1 <= len(receipt.replaced) < FRUITLESS
    await mesh.freed()


async def test_a_question_that_kills_every_engine_is_given_up(mesh: Mesh, autojump_clock: MockClock) -> None:
    for _ in range(5):
        await mesh.start(0, LAYERS)
    asker = await mesh.start()
    for member in mesh.members[:5]:
        member.local.dies_after = 0
    with pytest.raises(Declined, match=f"{FRUITLESS} routes were lost without a further token") as caught:
        await asker.ask()
    assert caught.value.code == "engine-lost"
    assert sum(len(member.engine_failures) for member in mesh.members) == FRUITLESS
    await mesh.freed()


async def test_who_is_full_is_asked_again_when_it_says(mesh: Mesh, autojump_clock: MockClock) -> None:
    """The only other holder has one session, which another answer takes meanwhile."""
    await mesh.start(0, LAYERS, max_sessions=1)
    asker, other = await mesh.start(), await mesh.start()
    async with trio.open_nursery() as nursery:
        begun = trio.Event()
        nursery.start_soon(lambda: other.ask(PROMPT, most=MOST, each=lambda _: begun.set()))
        await begun.wait()
        mesh.prefer = (await mesh.start(0, LAYERS)).peer
        receipt = await asker.ask(PROMPT, most=MOST, each=lambda n: kill(mesh, asker, 0) if n == 1 else None)
    assert receipt.tokens == alone(PROMPT, most=MOST)
    (replaced,) = receipt.replaced
    assert replaced.back_at is not None and 1 <= replaced.back_at - replaced.lost_at < 2, "it said: in a second"
    await mesh.freed()


@pytest.mark.parametrize("after", [0, 4])
async def test_cancelling_while_it_waits_frees_every_stage(mesh: Mesh, after: int, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    with trio.move_on_after(10 + after) as scope:
        await asker.ask(PROMPT, most=MOST, each=lambda count: kill(mesh, asker, 1) if count == 3 else None)
    assert scope.cancelled_caught
    await mesh.freed()


async def test_an_origin_that_dies_leaves_no_session(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    with trio.CancelScope() as scope:

        def each(count: int) -> None:
            if count == 5:
                asker.kill()
                scope.cancel()

        await asker.ask(PROMPT, most=MOST, each=each)
    with trio.fail_after(10):
        await mesh.freed()


async def test_the_release_stays_the_one_that_it_began_with(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    """Another one with the same words may be served by then: half an answer of each would be neither's."""

    def each(count: int) -> None:
        if count == 5:
            mesh.previous, mesh.current = RELEASE, replace(RELEASE, cid=RELEASE.cid[:-4] + "aaaa")  # type: ignore[arg-type]
            mesh.changes.notify()
            kill(mesh, asker, 1)

    receipt = await asker.ask(PROMPT, most=MOST, each=each)
    assert receipt.tokens == alone(PROMPT, most=MOST)
    assert receipt.release.cid == RELEASE.cid
    await mesh.freed()
