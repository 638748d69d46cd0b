"""The pieces of learning, each alone: what is kept on the disk, mixed, told to others, and whose turn it is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from meshnode.core.errors import DiskError
from meshnode.harness.hostile import ATTACKS, HostileTrainer
from meshnode.services.learning.book import Book, Page
from meshnode.services.learning.exchange import told_of
from meshnode.services.learning.making import place
from meshnode.services.learning.mixing import Arrived, Mixer
from meshnode.services.learning.worker import Round
from meshnode.state.budget import Budget, Limit
from meshnode.state.private_steps import PrivateSteps
from meshnode.trainer.port import Trained
from protocols.delta.frame import Vector
from protocols.delta.messages import Codec, Position
from protocols.ids import RAW, PeerId, cid_of
from protocols.round.events import Input
from protocols.round.schedule import Mode
from tests.adverts import peer_of

SIZE = 500
LESSON = cid_of(RAW, b"lesson")
ZERO: Vector = np.zeros(SIZE, np.float32)


def vector(seed: int, scale: float = 1.0) -> Vector:
    return (scale * np.random.default_rng(seed).standard_normal(SIZE)).astype(np.float32)


def came(number: int, values: Vector, weight: Fraction = Fraction(1, 2), staleness: int = 0) -> Arrived:
    given = Input(PeerId(peer_of(number)), Position(1, 0), cid_of(RAW, bytes([number])), weight, staleness)
    return Arrived(given, values)


# ---------------------------------------------------------------- the book


def test_a_page_comes_back_as_it_was_written(tmp_path: Path) -> None:
    page = Page(
        lesson=LESSON,
        vector=vector(1),
        published=3,
        steps=15,
        optimiser="/somewhere/moments",
        reference=vector(2),
        distances=[1.0, 2.5],
        recent=[(3, 1, "cid", 100)],
        parent="record",
    )
    Book(tmp_path / "frame", SIZE).write(page)
    found = Book(tmp_path / "frame", SIZE).read(LESSON)
    assert found is not None
    assert (found.published, found.steps, found.recent, found.distances) == (3, 15, [(3, 1, "cid", 100)], [1.0, 2.5])
    np.testing.assert_array_equal(found.vector, page.vector)
    assert found.reference is not None and found.slow is None


def test_a_page_of_another_lesson_or_a_damaged_one_is_none(tmp_path: Path) -> None:
    book = Book(tmp_path, SIZE)
    assert book.read(LESSON) is None
    book.write(Page(lesson=LESSON, vector=vector(1)))
    assert book.read(cid_of(RAW, b"another")) is None
    assert Book(tmp_path, SIZE + 1).read(LESSON) is None
    whole = (tmp_path / "learned.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "learned.npz").write_bytes(whole[:cut])
        assert book.read(LESSON) is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match="can't be kept"):
        Book(tmp_path / "file", SIZE).write(Page(lesson=LESSON, vector=vector(1)))


def test_former_jobs_go_and_the_curve_grows(tmp_path: Path) -> None:
    book = Book(tmp_path, SIZE)
    for steps in (0, 5, 10):
        book.job(steps).mkdir(parents=True)
    book.clear_jobs(str(book.job(10) / "moments"))
    assert [folder.name for folder in tmp_path.glob("steps-*")] == ["steps-000010"]
    book.note_losses(1, [2.0, 1.0])
    book.note_losses(3, [0.5])
    assert (tmp_path / "losses.csv").read_text() == "step,loss\n1,2\n2,1\n3,0.5\n"


# ---------------------------------------------------------------- mixing


def test_two_sides_of_a_pair_keep_their_mean() -> None:
    pages = [Page(lesson=LESSON, vector=vector(seed)) for seed in (1, 2)]
    mixers = [Mixer(page, ZERO, Mode.PAIRWISE, Codec.INT8) for page in pages]
    mean = (pages[0].vector + pages[1].vector) / 2
    sent = [mixer.pack(2)[0].sent for mixer in mixers]
    for mixer, theirs in zip(mixers, reversed(sent), strict=True):
        near, far = mixer.mix([came(3, theirs)])
        assert len(near) == 1 and not far
    np.testing.assert_allclose((pages[0].vector + pages[1].vector) / 2, mean, atol=1e-6)
    assert np.abs(pages[0].vector - pages[1].vector).max() < 0.1, "apart only by what 8 bits leave out"


def test_what_is_much_too_far_away_is_left_out() -> None:
    page = Page(lesson=LESSON, vector=vector(1), distances=[20.0] * 8)
    mixer = Mixer(page, ZERO, Mode.PAIRWISE, Codec.INT8)
    mixer.pack(2)
    before = page.vector
    near, far = mixer.mix([came(3, vector(2, scale=100.0))])
    assert not near and len(far) == 1 and far[0].far > far[0].most
    np.testing.assert_array_equal(page.vector, before)


def test_added_changes_are_the_same_for_all_in_any_order() -> None:
    changes = [vector(seed, 0.1) for seed in (1, 2, 3)]
    pages = [Page(lesson=LESSON, vector=ZERO.copy()) for _ in changes]
    mixers = [Mixer(page, ZERO, Mode.BROADCAST, Codec.SPARSE) for page in pages]
    for page, change in zip(pages, changes, strict=True):
        page.vector = page.vector + change
    sent = [mixer.pack(3)[0].sent for mixer in mixers]
    for k, mixer in enumerate(mixers):
        others = [came(i + 1, sent[i]) for i in range(3) if i != k]
        mixer.mix(others[:: 1 - 2 * (k % 2)])
    for page in pages[1:]:
        np.testing.assert_allclose(page.vector, pages[0].vector, atol=1e-6)
    assert all(page.residual is not None and np.abs(page.residual).max() > 0 for page in pages)


def test_a_newcomer_begins_with_the_mean_of_some() -> None:
    page = Page(lesson=LESSON, vector=vector(9))
    Mixer(page, ZERO, Mode.PAIRWISE, Codec.INT8).adopt([came(1, vector(1)), came(2, vector(2))])
    np.testing.assert_allclose(page.vector, (vector(1) + vector(2)) / 2, atol=1e-6)


# ---------------------------------------------------------------- what others learn of a round


def trained() -> Trained:
    return Trained(vector=ZERO, optimiser=Path("x"), losses=(2.0, 1.0), seconds=1.0, skipped=0, resumed=0)


def test_others_learn_how_a_round_went() -> None:
    told = told_of(Round(trained(), 40, None))
    assert (told.steps, told.samples, told.loss_before, told.loss_after) == (2, 40, 2.0, 1.0)


def test_others_learn_nothing_of_a_private_round_but_its_terms() -> None:
    steps = PrivateSteps(Budget(None), Limit(epsilon=8.0, delta=1e-5), 100)
    terms = steps.reserve(steps.plan(200, 8, 5))
    told = told_of(Round(trained(), 40, terms))
    assert (told.samples, told.loss_before, told.loss_after) == (0, 0.0, 0.0)
    assert told.privacy is not None and 0 < told.privacy.epsilon_milli <= 8000
    again = steps.reserve(steps.plan(200, 8, 5))
    assert again.epsilon > terms.epsilon, "what was reserved counts"


# ---------------------------------------------------------------- turns, and attackers


def test_everybody_has_another_turn_and_knows_it() -> None:
    peers = [PeerId(peer_of(k)) for k in range(1, 6)]
    assert sorted(place(peer, peers, LESSON) for peer in peers) == [0, 1, 2, 3, 4]
    other = [place(peer, peers, cid_of(RAW, b"another")) for peer in peers]
    assert other != [place(peer, peers, LESSON) for peer in peers]


def test_attacks_are_named() -> None:
    assert set(ATTACKS) == {"sign-flip", "label-flip", "alie", "ipm", "dissensus", "backdoor"}
    with pytest.raises(Exception, match="there is no attack"):
        HostileTrainer(None, "kindness")  # type: ignore[arg-type]
