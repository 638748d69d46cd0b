"""What a node remembers of its answers, whom it costs nothing, and when it says that they have become worse."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.core.errors import BadRequest, Declined, TokenizerLost
from meshnode.core.health import Health
from meshnode.policy.drift import FEWEST
from meshnode.services.samples import LOOK_S, SamplesService
from meshnode.state.samples import Samples
from meshnode.state.samples_port import Limits
from meshnode.text.question import Question
from protocols.errors import MeshError

ASKED = Question(messages=({"role": "user", "content": "Why?"},))
LIMITS = Limits(samples=100, size_bytes=1 << 20)


class Desk:
    """A service, with what it sees around it."""

    def __init__(self, *, keep: bool = True) -> None:
        self.error: MeshError | None = None
        self.text = "[user]Why?[assistant]"
        self.now = 1000
        self.health = Health(trio.current_time)
        self.buffer = Samples(None, LIMITS, lambda: b"")
        self.service = SamplesService(self.buffer, self, self.health, lambda: self.now, keep=keep)

    async def shown(self, question: Question) -> str:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self.text

    async def answer(self, text: str) -> int:
        kept = await self.service.keep(ASKED, text)
        assert kept is not None
        return kept

    def codes(self) -> dict[str, str]:
        return {shown.code: shown.text for shown in self.health.current()}


async def test_an_answer_is_kept_as_the_model_saw_its_question() -> None:
    desk = Desk()
    kept = await desk.answer("Because.")
    judged = desk.service.judge(kept, False, "No idea.")
    assert (judged.input, judged.output, judged.label) == ("[user]Why?[assistant]", "Because.", "No idea.")
    with pytest.raises(BadRequest, match="no answer 99"):
        desk.service.judge(99, True, "")


async def test_nothing_is_kept_where_the_owner_does_not_want_it() -> None:
    desk = Desk(keep=False)
    assert await desk.service.keep(ASKED, "Because.") is None
    assert desk.buffer.summary().samples == 0


@pytest.mark.parametrize("error", [Declined("no-text", "in token ids"), TokenizerLost("gone")])
async def test_an_answer_does_not_fail_because_it_can_not_be_kept(error: MeshError) -> None:
    desk = Desk()
    desk.error = error
    assert await desk.service.keep(ASKED, "Because.") is None
    assert not desk.codes()


async def test_a_disk_that_takes_nothing_is_told_and_forgiven() -> None:
    desk = Desk()
    desk.buffer._db.execute("PRAGMA max_page_count=1")
    desk.text = "x" * 60_000
    assert await desk.service.keep(ASKED, "Because.") is None
    assert "Answers are not kept" in desk.codes()["samples-unusable"]
    desk.buffer._db.execute("PRAGMA max_page_count=100000")
    assert await desk.service.keep(ASKED, "Because.") is not None
    assert not desk.codes()


async def test_drift_is_told_with_a_remedy_and_ends(autojump_clock: MockClock) -> None:
    desk = Desk()
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.service.run)
        for number in range(FEWEST):
            desk.text = f"question {number}"
            kept = await desk.answer("out")
            assert "drift" not in desk.codes(), number
            desk.service.judge(kept, number > 1, "")
        told = desk.codes()["drift"]
        assert told.startswith("2 of the last 20 answers that were judged on this device were wrong (10 %): ")
        assert "meshnode data list --wrong" in told and "meshnode release rollback" in told
        desk.buffer.forget(desk.buffer.every(), 1)  # by a command, beside the node
        await trio.sleep(LOOK_S + 1)
        assert "drift" not in desk.codes()
        nursery.cancel_scope.cancel()


async def test_a_file_that_can_not_be_read_ends_nothing(autojump_clock: MockClock) -> None:
    desk = Desk()
    desk.buffer._db.execute("ALTER TABLE samples RENAME TO elsewhere")
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.service.run)
        await wait_all_tasks_blocked()
        assert "samples-unusable" in desk.codes()
        nursery.cancel_scope.cancel()
