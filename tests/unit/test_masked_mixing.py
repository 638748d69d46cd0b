"""What a node shows in the mode masked, and how means of cohorts are mixed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from meshnode.services.learning.book import Page
from meshnode.services.learning.mixing import Arrived, Mixer
from protocols.delta.codec import unpack_delta
from protocols.delta.frame import Vector
from protocols.delta.messages import Codec, Position
from protocols.round.events import Input
from protocols.round.schedule import Mode
from tests.deltas import delta_cid, peer_of

SIZE = 200
CHANCE = np.random.default_rng(5)
BASE = CHANCE.normal(0, 0.1, SIZE).astype(np.float32)


def values(scale: float = 1.0) -> Vector:
    return CHANCE.normal(0, scale, SIZE).astype(np.float32)


def mixer() -> tuple[Mixer, Page]:
    page = Page(lesson="lesson", vector=BASE.copy())
    return Mixer(page, BASE, Mode.MASKED, Codec.INT8), page


def shown(one: Mixer) -> Vector:
    packed, whole = one.pack(4)
    assert whole is None
    return unpack_delta(packed.payload, codec=Codec.INT8, parameters=SIZE)


def test_what_was_trained_is_never_shown_by_itself() -> None:
    one, page = mixer()
    page.vector = BASE + values()
    assert not shown(one).any(), "there was no cohort yet"
    mean = values()
    one.meet(mean, included=True)
    np.testing.assert_allclose(shown(one), mean, atol=0.05)
    trained = values(0.5)
    page.vector = page.vector + trained
    np.testing.assert_allclose(shown(one), mean, atol=0.05)
    again = Mixer(page, BASE, Mode.MASKED, Codec.INT8)  # after a crash
    np.testing.assert_allclose(shown(again), mean, atol=0.05)


def test_who_was_not_in_the_mean_keeps_what_it_trained_for_the_next_one() -> None:
    one, page = mixer()
    trained, mean = values(), values()
    page.vector = page.vector + trained
    one.meet(mean, included=False)
    np.testing.assert_allclose(one.difference, mean + trained, atol=1e-5)
    np.testing.assert_allclose(shown(one), mean, atol=0.05)
    one.end()
    np.testing.assert_allclose(page.vector, BASE + mean, atol=1e-6)


def test_a_spoilt_mean_of_one_cohort_of_six_moves_the_others_little() -> None:
    """The rules that act on adapters act on the means of cohorts."""
    one, page = mixer()
    ours, others = values(0.1), [values(0.1) for _ in range(4)]
    one.meet(ours, included=True)
    one.pack(24)

    def arrived(name: str, vector: Vector) -> Arrived:
        given = Input(peer_of(name), Position(1, 0), delta_cid(name, 1), Fraction(1, 6), 0)
        return Arrived(given, vector)

    spoilt = arrived("eve", np.full(SIZE, 100, np.float32))
    near, far = one.mix([*(arrived(str(i), other) for i, other in enumerate(others)), spoilt])
    assert [away.given.peer for away in far] == [peer_of("eve")]
    assert len(near) == 4
    assert page.reference is not None
    clean = np.mean([ours, *others], axis=0)
    assert np.linalg.norm(page.vector - BASE - clean) < np.linalg.norm(ours - clean) + 0.5
    np.testing.assert_allclose(page.vector, page.reference, atol=1e-6)
