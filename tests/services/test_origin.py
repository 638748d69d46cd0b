"""Generations through real stage services, pipes and machines on the in-memory network, in virtual time."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.services.inference.attempts import HEAL_S
from meshnode.services.inference.origin import EVENTS
from meshnode.services.inference.receipt import Piece, Receipt, Request
from protocols.errors import RemoteProtocolError
from protocols.ids import RAW, PeerId
from protocols.manifest.messages import FileRef
from protocols.pipe.messages import Close, Grammar, HopTime, Open, Opened, Refused, Sampling, Token
from protocols.pipe.timeouts import FIRST_OPEN_S, IDLE_S, STEP_S
from tests.services.pipe_mesh import GREEDY, LAYERS, PROMPT, RELEASE, SHAPE, Member, Mesh, alone, open_mesh
from tests.text_files import letter_tokenizer

Lie = Callable[[bytes], Opened | Refused | Token]
TIME = HopTime(network_us=0, queue_us=0, compute_us=0)
DRAWN = Sampling(
    seed=11,
    temperature_milli=900,
    top_k=50,
    top_p_micro=950_000,
    repetition_milli=1100,
    min_p_micro=1000,
    presence_milli=500,
    frequency_milli=-300,
    chances=3,
)


# ---------------------------------------------------------------- the same tokens, however many stages


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with open_mesh() as made:
        yield made


@pytest.fixture
async def asker(mesh: Mesh) -> Member:
    """Serves nothing; the first three members serve three layers each."""
    return await mesh.chain(3, 6)


@pytest.mark.parametrize("cuts", [(), (3, 4), (1, 2, 5, 8)])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
async def test_a_chain_gives_the_tokens_of_one_process(
    mesh: Mesh, cuts: tuple[int, ...], sampling: Sampling, autojump_clock: MockClock
) -> None:
    asker = await mesh.chain(*cuts)
    receipt = await asker.ask(most=20, sampling=sampling)
    assert receipt.tokens == alone(most=20, sampling=sampling)
    assert receipt.reason == ("length" if len(receipt.tokens) == 20 else "eos")
    assert [(hop.first, hop.last) for hop in receipt.route] == list(zip((0, *cuts), (*cuts, LAYERS), strict=True))
    await mesh.freed()


async def test_a_chain_gives_the_vector_of_one_process(mesh: Mesh, autojump_clock: MockClock) -> None:
    alone_ = await (await mesh.chain()).embed()
    await mesh.freed()
    async with open_mesh() as longer:
        asker = await longer.chain(2, 5)
        assert await asker.embed() == alone_
        assert await asker.embed(chunk_rows=3) == alone_
        assert await asker.embed((5, 6, 7, 8, 10)) != alone_
        whole = (7,) * SHAPE.context
        assert len(await asker.embed(whole)) == SHAPE.hidden, "it needs no room for an answer"
        with pytest.raises(Declined, match="the model holds"):
            await asker.embed((*whole, 1))
        await longer.freed()


async def test_an_answer_has_the_form_that_was_asked_for(mesh: Mesh, autojump_clock: MockClock) -> None:
    """The mask holds at the stage that draws, however many there are; the same draws without it have no such form."""
    letters = serve_letters(mesh)
    asker = await mesh.chain(3, 6)
    form = Grammar(kind="regex", text=b"(red|green|blue) [0-9]{2}")
    for seed in range(6):
        hot = replace(DRAWN, seed=seed, temperature_milli=1500)
        receipt = await asker.ask(most=20, sampling=hot, grammar=form)
        assert re.fullmatch("(red|green|blue) [0-9]{2}", letters.decode(receipt.tokens)), letters.decode(
            receipt.tokens
        )
        assert receipt.reason == "eos"
        free = await asker.ask(most=20, sampling=hot)
        assert not re.fullmatch("(red|green|blue) [0-9]{2}", letters.decode(free.tokens))
    await mesh.freed()


@pytest.mark.parametrize(
    ("grammar", "code", "words"),
    [
        (Grammar(kind="regex", text=b"[a-"), "bad-grammar", "the regex can't be used"),
        (Grammar(kind="regex", text="ü".encode()), "bad-grammar", "no text fits it"),
    ],
)
async def test_a_wrong_grammar_is_told_before_the_answer(
    mesh: Mesh, grammar: Grammar, code: str, words: str, autojump_clock: MockClock
) -> None:
    serve_letters(mesh)
    asker = await mesh.chain(3, 6)
    with pytest.raises(Declined, match=words) as refused:
        await asker.ask(grammar=grammar)
    assert refused.value.code == code
    await mesh.freed()


async def test_where_grammars_cannot_be_used_is_said(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(3, 6)
    with pytest.raises(Declined, match="can't use grammars: nobody gave it") as refused:
        await asker.ask(grammar=Grammar(kind="regex", text=b"a"))
    assert refused.value.code == "no-grammar"
    await mesh.freed()


def serve_letters(mesh: Mesh) -> Any:
    """Have the served model come with a tokenizer of single letters; it."""
    letters = letter_tokenizer()
    data = letters.to_str().encode()
    cid = mesh.content.put_block(data, RAW)
    manifest = replace(RELEASE.manifest, files={"tokenizer.json": FileRef(cid=cid, size=len(data))})
    mesh.current = replace(RELEASE, manifest=manifest)
    return letters


async def test_an_origin_that_serves_takes_part_in_its_own_chain(mesh: Mesh, autojump_clock: MockClock) -> None:
    first = await mesh.start(0, 5)
    last = await mesh.start(5, LAYERS)
    for origin in (first, last):
        assert (await origin.ask()).tokens == alone()
    await mesh.freed()


async def test_the_cuts_of_a_prompt_change_nothing(mesh: Mesh, autojump_clock: MockClock) -> None:
    prompt = tuple(range(3, 60))
    asker = await mesh.chain(4)
    for rows in (3, 8, 256):
        assert (await asker.ask(prompt, chunk_rows=rows)).tokens == alone(prompt)
    assert (0, 3) in mesh.members[1].local.steps


async def test_several_sessions_at_once_do_not_mix(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    prompts = [(5, 6, 7 + i) for i in range(6)]
    got: dict[int, list[int]] = {}
    second = await mesh.start()

    async def one(number: int) -> None:
        got[number] = (await (asker, second)[number % 2].ask(prompts[number])).tokens

    async with trio.open_nursery() as nursery:
        for number in range(len(prompts)):
            nursery.start_soon(one, number)
    assert got == {number: alone(prompt) for number, prompt in enumerate(prompts)}
    await mesh.freed()


async def test_the_receipt_tells_where_the_time_went(asker: Member, autojump_clock: MockClock) -> None:
    receipt = await asker.ask(most=4)
    assert receipt.prompt == PROMPT
    assert len(receipt.arrivals) == len(receipt.tokens) == len(receipt.hop_times) == len(receipt.return_us) == 4
    assert receipt.arrivals == sorted(receipt.arrivals)
    assert receipt.first_token_ms > 0
    assert receipt.decode_tokens_s > 0
    assert [hop["compute_ms"] for hop in receipt.hops()] == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------- ends


async def test_the_answer_ends_at_an_end_token(mesh: Mesh, asker: Member, autojump_clock: MockClock) -> None:
    right = alone(most=12)
    manifest = replace(RELEASE.manifest, architecture=replace(SHAPE, eos_ids=(right[4],)))
    mesh.current = replace(RELEASE, manifest=manifest)
    receipt = await asker.ask()
    assert receipt.tokens == right[: right.index(right[4]) + 1]
    assert receipt.reason == "eos"
    await mesh.freed()


async def test_a_long_answer_ends_at_the_context(asker: Member, autojump_clock: MockClock) -> None:
    prompt = tuple(3 + i % 200 for i in range(SHAPE.context - 3))
    receipt = await asker.ask(prompt, most=1000)
    assert (len(receipt.tokens), receipt.reason) == (3, "length")


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_cancelling_frees_the_session_on_every_stage(
    mesh: Mesh, asker: Member, after: int, autojump_clock: MockClock
) -> None:
    with trio.CancelScope() as scope:

        def each(count: int) -> None:
            if count == after:
                scope.cancel()

        if after == 0:
            for member in mesh.members[:3]:
                member.local.held = trio.Event()
            scope.deadline = trio.current_time() + 1
        await asker.ask(most=200, each=each)
    assert scope.cancelled_caught
    for member in mesh.members[:3]:
        if member.local.held is not None:
            member.local.held.set()
    await mesh.freed()


async def test_no_stage_holds_a_session_while_the_reader_looks_at_the_receipt(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    async with aclosing(asker.origin.generate(Request(PROMPT, 2, GREEDY))) as pieces:
        async for piece in pieces:
            if isinstance(piece, Receipt):
                await mesh.freed()


async def test_a_slow_reader_loses_nothing(asker: Member, autojump_clock: MockClock) -> None:
    got: list[int] = []
    async with aclosing(asker.origin.generate(Request(PROMPT, 6, GREEDY))) as pieces:
        async for piece in pieces:
            if isinstance(piece, Piece):
                got.append(piece.token)
                await trio.sleep(1.2 * STEP_S if len(got) == 3 else 0)
    assert got == alone(most=6)


async def test_a_lost_goodbye_costs_a_stage_its_patience_not_the_session_for_ever(
    mesh: Mesh, autojump_clock: MockClock
) -> None:
    asker = await mesh.chain(4)
    deaf = mesh.members[1]
    deaf.pipes.handle(Close, lambda *_: None)
    await asker.ask(most=2)
    assert deaf.load.sessions == 1
    with trio.fail_after(IDLE_S + 10):
        while deaf.load.sessions:
            await mesh.change()


# ---------------------------------------------------------------- stages that die, hang and refuse


async def fails(member: Member, prompt: tuple[int, ...] = PROMPT, most: int = 50) -> PeerUnreachable | Declined:
    """The error that a generation ends with."""
    with pytest.raises((PeerUnreachable, Declined)) as caught:
        await member.ask(prompt, most=most)
    return caught.value


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_stage_that_dies_on_the_way_is_named_with_its_layers(
    mesh: Mesh, asker: Member, number: int, autojump_clock: MockClock
) -> None:
    victim = mesh.members[number - 1]
    died = [0.0]

    def each(count: int) -> None:
        if count == 5:
            died[0] = trio.current_time()
            victim.kill()

    with pytest.raises(PeerUnreachable) as caught:
        await asker.ask(most=100, each=each)
    assert HEAL_S <= trio.current_time() - died[0] < HEAL_S + 5, "somebody might have taken over"
    assert caught.value.peer == victim.peer
    assert victim.peer in str(caught.value)
    span = victim.local.spec
    assert f"layers {span.first} to {span.last - 1}" in str(caught.value)
    await mesh.freed()


async def test_a_link_between_stages_that_breaks_blames_the_one_that_was_not_reached(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    one, other = mesh.members[1:3]

    def each(count: int) -> None:
        if count == 3:
            mesh.network.partition([one.peer], [other.peer])

    with pytest.raises(PeerUnreachable) as caught:
        await asker.ask(most=100, each=each)
    assert caught.value.peer == other.peer
    assert "layers 6 to 8" in str(caught.value)
    assert one.peer in str(caught.value)
    await mesh.freed()


@pytest.mark.parametrize(
    ("failure", "code"), [("engine", "engine-lost"), ("restarted", "fenced"), ("idle", "fenced"), ("moved", "fenced")]
)
async def test_before_the_first_token_another_route_is_taken(
    mesh: Mesh, failure: str, code: str, autojump_clock: MockClock
) -> None:
    broken = await mesh.start(0, LAYERS)
    other = await mesh.start(0, LAYERS)
    asker = await mesh.start()
    mesh.prefer = broken.peer
    assert broken.served is not None
    match failure:
        case "engine":
            broken.local.dies_after = 0
        case "restarted":
            broken.served.incarnation = 2
        case "idle":
            broken.served = None
        case "moved":
            broken.served.span = replace(broken.served.span, first=1)
    said: list[str] = []

    def refused(peer: PeerId, message: Refused, body: bytes, network_us: int) -> None:
        said.append(message.code)
        asker.origin.receive(peer, message, body, network_us)

    asker.pipes.handle(Refused, refused)
    receipt = await asker.ask()
    assert receipt.tokens == alone()
    assert receipt.route[0].peer == other.peer
    assert said == [code]
    assert broken.engine_failures == (["it was killed by SIGKILL"] if failure == "engine" else [])
    await mesh.freed()


async def test_a_busy_stage_is_avoided(mesh: Mesh, autojump_clock: MockClock) -> None:
    full = await mesh.start(0, LAYERS, max_sessions=0)
    free = await mesh.start(0, LAYERS)
    asker = await mesh.start()
    mesh.prefer = full.peer
    receipt = await asker.ask()
    assert receipt.tokens == alone()
    assert receipt.route[0].peer == free.peer


async def test_without_another_way_the_first_no_is_passed_on(mesh: Mesh, autojump_clock: MockClock) -> None:
    full = await mesh.start(0, LAYERS, max_sessions=0)
    asker = await mesh.start()
    error = await fails(asker)
    assert isinstance(error, Declined)
    assert (error.code, error.peer, error.retry_ms) == ("busy", full.peer, 1000)
    assert "sessions are taken" in str(error)


async def test_a_dead_stage_without_a_replica_is_named_at_once(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    mesh.members[1].kill()
    began = trio.current_time()
    error = await fails(asker)
    assert isinstance(error, PeerUnreachable)
    assert error.peer == mesh.members[1].peer
    assert "layers 3 to 5" in str(error)
    assert trio.current_time() - began < 5
    await mesh.freed()


async def test_an_engine_that_hangs_ends_the_answer_with_a_sentence(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:

    def each(count: int) -> None:
        if count == 3:
            mesh.members[2].local.held = trio.Event()

    with pytest.raises(PeerUnreachable, match=r"no token came within 6\d s from the node .*, which runs layers 0"):
        await asker.ask(most=100, each=each)
    held = mesh.members[2].local.held
    assert held is not None
    held.set()
    await mesh.freed()


@pytest.mark.parametrize("bandwidth", [0.0, 2_000.0])
async def test_a_slow_link_is_slow_and_right(
    mesh: Mesh, asker: Member, bandwidth: float, autojump_clock: MockClock
) -> None:
    prompt = tuple(3 + i % 200 for i in range(200))
    for one in mesh.members:
        for other in mesh.members:
            if one is not other:
                mesh.network.set_link(one.peer, other.peer, delay=0.3, bandwidth=bandwidth)
    receipt = await asker.ask(prompt, most=5, chunk_rows=50)
    assert receipt.tokens == alone(prompt, most=5)
    assert 0.5 < receipt.decode_tokens_s < 1 / 1.2
    await mesh.freed()


# ---------------------------------------------------------------- bad requests and bad peers


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (Request((), 5, GREEDY), "bad-request", "the prompt is empty"),
        (Request((5, SHAPE.vocab), 5, GREEDY), "bad-request", "the token id 211; those of"),
        (Request((5,) * SHAPE.context, 5, GREEDY), "too-long", "the prompt has 256 tokens; the model holds 256"),
    ],
)
async def test_bad_requests_are_declined_with_a_sentence(
    mesh: Mesh, asker: Member, request_: Request, code: str, words: str, autojump_clock: MockClock
) -> None:
    with pytest.raises(Declined) as caught:
        async with aclosing(asker.origin.generate(request_)) as pieces:
            async for _ in pieces:
                pass
    assert caught.value.code == code
    assert words in str(caught.value)
    await mesh.freed()
    assert (await asker.ask()).tokens == alone()


async def test_without_a_model_or_a_chain_that_is_said(mesh: Mesh, autojump_clock: MockClock) -> None:
    await mesh.start(0, 4)
    asker = await mesh.start()
    error = await fails(asker)
    assert isinstance(error, Declined)
    assert error.code == "no-route"
    assert "layers 4 to 8 are held by nobody" in str(error)
    mesh.current = None
    error = await fails(asker)
    assert isinstance(error, Declined)
    assert (error.code, str(error).startswith("the network serves no model yet")) == ("no-model", True)


async def test_a_peer_that_answers_for_a_session_of_others_is_refused(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(4)
    stranger = await mesh.start()
    got: list[int] = []
    async with aclosing(asker.origin.generate(Request(PROMPT, 10, GREEDY))) as pieces:
        async for piece in pieces:
            if isinstance(piece, Piece):
                got.append(piece.token)
            if len(got) != 2:
                continue
            (key,) = asker.origin._running
            for lie in (
                Token(session=key, attempt=0, position=7, token=1, sent_us=0, times=(TIME, TIME)),
                Refused(session=key, attempt=0, index=0, code="busy", reason="ha"),
            ):
                with pytest.raises(RemoteProtocolError, match="takes no part in"):
                    asker.origin.receive(stranger.peer, lie, b"", 0)
                await stranger.pipes.send(asker.peer, lie)
    assert got == alone(most=10)


@pytest.mark.parametrize(
    ("liar", "lie"),
    [
        (0, lambda key: Token(session=key, attempt=0, position=7, token=1, sent_us=0, times=(TIME, TIME))),
        (1, lambda key: Token(session=key, attempt=0, position=99, token=1, sent_us=0, times=(TIME, TIME))),
        (1, lambda key: Token(session=key, attempt=0, position=7, token=1, sent_us=0)),
        (0, lambda key: Refused(session=key, attempt=0, index=1, code="busy", reason="in the name of the other")),
        (0, lambda key: Opened(session=key, attempt=0, index=0)),
    ],
)
async def test_a_stage_that_lies_ends_its_session_and_nothing_else(
    mesh: Mesh, liar: int, lie: Lie, autojump_clock: MockClock
) -> None:
    asker = await mesh.chain(4)
    peer = mesh.members[liar].peer
    for heal_s in (0.0, HEAL_S):
        request = Request(PROMPT, 50, GREEDY, heal_s=heal_s)
        with pytest.raises(PeerUnreachable) if not heal_s else nullcontext() as caught:
            async with aclosing(asker.origin.generate(request)) as pieces:
                await anext(pieces)
                (key,) = asker.origin._running
                asker.origin.receive(peer, lie(key), b"", 0)
                *_, receipt = [piece async for piece in pieces]
        if caught is not None:
            assert caught.value.peer == peer
            assert "broke the rules of the pipe" in str(caught.value)
        else:
            assert isinstance(receipt, Receipt)
            (replaced,) = receipt.replaced
            assert replaced.hop is not None and replaced.hop.peer == peer
            assert "broke the rules of the pipe" in replaced.reason
            assert receipt.tokens == alone(most=50), "the only way there is, and this time without lies"
    await mesh.freed()
    assert (await asker.ask()).tokens == alone()


async def test_a_flood_is_the_fault_of_its_peer_and_a_loss_is_still_heard(
    mesh: Mesh, autojump_clock: MockClock
) -> None:
    asker = await mesh.chain(4)
    peer = mesh.members[0].peer
    with pytest.raises(PeerUnreachable):
        async with aclosing(asker.origin.generate(Request(PROMPT, 50, GREEDY, heal_s=0))) as pieces:
            await anext(pieces)
            (key,) = asker.origin._running
            with pytest.raises(RemoteProtocolError, match=f"more than {EVENTS} messages"):
                for _ in range(EVENTS + 1):
                    asker.origin.receive(peer, Opened(session=key, attempt=0, index=0), b"", 0)
            asker.origin.peer_lost(mesh.members[1].peer, "its cable was cut")
            async for _ in pieces:
                pass
    await mesh.freed()


async def test_answers_after_the_end_are_ignored(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(4)
    await asker.ask(most=1)
    late = Opened(session=bytes(16), attempt=0, index=0)
    asker.origin.receive(mesh.members[0].peer, late, b"", 0)
    assert asker.origin.in_flight() == {}


async def test_a_reader_that_falls_asleep_holds_no_stage(
    mesh: Mesh, asker: Member, autojump_clock: MockClock
) -> None:
    got: list[int] = []
    async with aclosing(asker.origin.generate(Request(PROMPT, 15, GREEDY))) as pieces:
        async for piece in pieces:
            if isinstance(piece, Piece):
                got.append(piece.token)
                if len(got) == 3:
                    with trio.fail_after(30):
                        while any(member.load.sessions for member in mesh.members):
                            await mesh.change()
                    await trio.sleep(3600)
    assert got == alone(most=15)


async def test_a_black_hole_costs_one_question_its_patience_and_further_ones_nothing(
    mesh: Mesh, autojump_clock: MockClock
) -> None:
    asker = await mesh.chain()
    hole = await mesh.start(0, LAYERS)
    mesh.prefer = hole.peer
    hole.pipes.handle(Open, lambda *_: None)
    took = []
    for _ in range(12):
        began = trio.current_time()
        assert (await asker.ask()).tokens == alone()
        took.append(trio.current_time() - began >= FIRST_OPEN_S)
    assert sum(took) <= 1, "it is not asked again within the next moments"
    assert [shown.facts["peer"] for shown in asker.health.current()] == [hole.peer] * sum(took)
    assert any(took), "it looks so fast that it was asked"


async def test_the_only_way_is_tried_even_through_a_suspect(mesh: Mesh, autojump_clock: MockClock) -> None:
    asker = await mesh.chain(4)
    mesh.members[1].local.dies_after = len(mesh.members[1].local.steps) + 2
    with pytest.raises(Declined, match="engine"):
        await asker.ask()
    mesh.members[1].local.dies_after = None
    assert (await asker.ask()).tokens == alone()
    assert not asker.health.current()
