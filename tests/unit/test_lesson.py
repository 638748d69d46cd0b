"""Lessons: what they say, which one holds, what a suite may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.core.errors import ModelError
from meshnode.services.learning.lessons import followed, read_suite
from protocols.codec import encode
from protocols.delta.frame import Frame, Target, encode_frame
from protocols.ids import DAG_CBOR, RAW, PeerId, cid_of, cid_to_bytes
from protocols.lesson.messages import Lesson, lesson_cid, read_lesson
from tests.adverts import peer_of
from tests.vectors import Case, hold

FRAME = Frame(
    base=cid_of(DAG_CBOR, b"model"),
    rank=8,
    alpha=16,
    targets=(Target("q_proj", 64, 64), Target("v_proj", 64, 32)),
    first=2,
    last=4,
    seed=1,
)
ADAPTER = cid_to_bytes(cid_of(DAG_CBOR, b"adapter"))
LESSON = Lesson(
    created_ms=1_700_000_000_000,
    frame=encode_frame(FRAME),
    suite=cid_to_bytes(cid_of(RAW, b"suite")),
    suite_size=1000,
)


def test_vectors() -> None:
    full = replace(LESSON, mode="broadcast", codec=3, rounds=40, steps=10, mixes=0, gate=0, least=4, start=ADAPTER)
    hold(
        "lesson",
        [
            Case("with defaults", encode(LESSON), LESSON),
            Case("with everything", encode(full), full),
            Case("of an unknown mode", encode(replace(LESSON, mode="magic"))),
            Case("whose suite is a block", encode(replace(LESSON, suite=cid_to_bytes(cid_of(DAG_CBOR, b"suite"))))),
            Case("whose suite has no name", encode(replace(LESSON, suite=b"nothing"))),
            Case("that begins with a file", encode(replace(LESSON, start=LESSON.suite))),
            Case("with a byte more", encode(LESSON) + b"\x00"),
        ],
        read_lesson,
    )


def one(number: int, created_ms: int) -> tuple[PeerId, bytes]:
    return PeerId(peer_of(number)), encode(replace(LESSON, created_ms=created_ms))


def test_a_founders_word_goes_first_then_the_newest() -> None:
    old, new, founders = one(1, 10), one(2, 20), one(3, 5)
    given, wrong = followed(dict((old, new, founders)), lambda peer: peer == founders[0])
    assert given is not None and given.publisher == founders[0] and not wrong
    given, _ = followed(dict((old, new)), lambda peer: False)
    assert given is not None and given.publisher == new[0] and given.cid == lesson_cid(new[1])


def test_what_is_taken_back_or_no_lesson_has_no_effect() -> None:
    taken, broken = PeerId(peer_of(1)), PeerId(peer_of(2))
    given, wrong = followed({taken: b"", broken: b"no cbor"}, lambda peer: True)
    assert given is None
    assert set(wrong) == {broken}


def test_a_suite_is_lines_with_input_and_label() -> None:
    good = b'{"input": "a", "label": "x"}\n\n{"input": "b", "label": "y", "more": 1}\n'
    assert [(line.input, line.label) for line in read_suite(good)] == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no samples"),
        (b"nonsense", "Line 1 of the suite is no JSON"),
        (b'{"input": "a", "label": "x"}\n[1]', "Line 2"),
        (b'{"input": "a", "label": " "}', "Line 1"),
        (b'{"input": "' + b"a" * 70_000 + b'", "label": "x"}', "bytes"),
        (b"\n".join(b'{"input": "a", "label": "%d"}' % k for k in range(1100)), "different labels"),
    ],
)
def test_what_is_no_suite_is_refused_with_the_line(data: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_suite(data)
