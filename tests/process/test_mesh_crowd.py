"""Many questions at once, and a change of precision under them, on real nodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from meshnode.api.messages import Status
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import QUESTION, READY_S, mesh_of, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("crowd")
    published = small_model(folder / "model", variants=("int4", "int8"))
    with mesh_of(folder, 3, published=published, memory=("4MB",), settings=(("serve.layers", 8),)) as mesh:
        yield mesh


@pytest.mark.parametrize("count", (20, 100))
@pytest.mark.long
def test_all_questions_at_once_are_answered_in_turn(mesh: Mesh, count: int) -> None:
    questions = [replace(QUESTION, token_ids=(5, 6, 7 + number % 50)) for number in range(count)]
    right = {question: tokens_of(mesh.members[0], question) for question in set(questions[:3])}
    over = threading.Event()

    def watch() -> list[str]:
        unready = []
        while not over.wait(0.2):
            unready += [s.readiness for member in mesh.members if not (s := member.status()).ready]
        return unready

    with ThreadPoolExecutor(count + 1) as pool:
        watching = pool.submit(watch)
        try:
            asked = [pool.submit(tokens_of, mesh.members[i % 3], q) for i, q in enumerate(questions)]
            answers = [one.result(READY_S) for one in asked]
        finally:
            over.set()
    assert all(tokens == right.get(question, tokens) for question, tokens in zip(questions, answers, strict=True))
    assert all(len(tokens) == QUESTION.max_tokens for tokens in answers)
    assert watching.result() == [], "a busy mesh is no broken one"


def test_no_question_fails_while_the_mesh_goes_over_to_another_precision(mesh: Mesh) -> None:
    right = tokens_of(mesh.members[0])
    over = threading.Event()

    def ask_on(number: int) -> int:
        count = 0
        while not over.is_set():
            assert tokens_of(mesh.members[number]) == right
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on, number) for number in range(3)]
        try:
            engines = [status.engine.pid for member in mesh.members if (status := member.status()).engine]
            mesh.members[0].client.serve("small-noise", variant="int8")
            for member in mesh.members:

                def gone_over(status: Status) -> bool:
                    return status.engine is not None and status.engine.pid not in engines and not status.me.target

                member.wait_for(gone_over, READY_S, "the change to int8")
            mesh.wait_ready(READY_S)
        finally:
            over.set()
        assert all(one.result(READY_S) for one in asking)
