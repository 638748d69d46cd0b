"""SIGKILL of each stage in turn, early and late in an answer of SmolLM2: word for word what it would have been."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshnode.harness.mesh import Mesh
from protocols.pipe.messages import Sampling
from tests.model.real_mesh import alone, asked, real_mesh

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.slow, pytest.mark.long]

PROMPT = list(range(5000, 5060))
TOKENS = 256
STAGES = 3
READY_S = 90.0
SAMPLINGS = {
    "greedy": (0.0, Sampling(seed=0)),
    "sampled": (0.9, Sampling(seed=7, temperature_milli=900)),
}


@pytest.fixture(scope="module", params=[0, 1], ids=["all three are needed", "a fourth has room"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """The bootstrap peer asks, so every stage may be lost."""
    with real_mesh("int4", STAGES, spare=request.param, bootstrap=True) as mesh:
        yield mesh


@pytest.mark.parametrize("at", [1, 8, 64, 200])
@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("how", SAMPLINGS)
def test_an_answer_goes_on_when_a_stage_is_killed(mesh: Mesh, how: str, stage: int, at: int) -> None:
    temperature, sampling = SAMPLINGS[how]
    usual = alone("int4").answer(PROMPT, TOKENS, sampling)
    assert len(usual) == TOKENS
    mesh.wait_ready(READY_S)
    spare = len(mesh.serving) > STAGES
    if spare:
        mesh.serving[0].wait_for(
            lambda status: status.copies is not None and not status.copies.short, READY_S, "copies"
        )
    client = mesh.members[0].client
    question = asked(token_ids=PROMPT, max_tokens=TOKENS, temperature=temperature, seed=sampling.seed)
    route = client.ask(replace(question, max_tokens=1)).whole().receipt.route
    victim = mesh.member(route[stage].peer)
    answers = client.ask(question)
    for _ in range(at):
        next(answers)
    victim.signal(signal.SIGKILL)
    victim.wait_stopped()
    if not spare:
        mesh.up()
    answer = answers.whole()
    mesh.up()
    assert list(answer.token_ids) == usual
    (lost,) = answer.receipt.replaced
    assert (lost.peer, lost.first, lost.last) == (victim.peer_id, route[stage].first, route[stage].last)
    assert at <= lost.tokens < TOKENS
    print(f"\n{how}, stage {stage} at token {at}: noticed at {lost.tokens}, went on after {lost.gap_ms:.0f} ms")
