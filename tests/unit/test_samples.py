"""The samples of a device: what is kept, in which room, under which cover, and what is left after it is forgotten."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.core.errors import BadRequest, ConfigError, DiskError
from meshnode.state.samples import Samples, is_sealed
from meshnode.state.samples_port import MAX_ANSWERS, MAX_SAMPLE_BYTES, Limits, NewSample, Result, Window
from meshnode.state.sealing import samples_key

NOW = 1_800_000_000_000
ROOM = Limits(samples=1000, size_bytes=10_000_000)
KEY = samples_key(b"s" * 32, "net")


def key() -> bytes:
    return KEY


def no_key() -> bytes:
    raise AssertionError("the key is not needed")


def opened(path: Path | None = None, limits: Limits = ROOM, *, encrypt: bool | None = None) -> Samples:
    return Samples(path, limits, key if encrypt else no_key, encrypt=encrypt)


def lines(count: int, label: str = "a", *, start: int = 0, correct: bool | None = None) -> list[NewSample]:
    return [NewSample(input=f"text {start + n}", label=label, correct=correct) for n in range(count)]


def answered(samples: Samples, text: str, output: str = "out") -> int:
    kept = samples.keep_answer(text, output, NOW)
    assert kept is not None
    return kept


# ---------------------------------------------------------------- what comes in


def test_an_answer_is_kept_and_judged() -> None:
    with opened() as samples:
        first, second = answered(samples, "Why?", " Because. "), answered(samples, "How?")
        assert samples.summary().answers == 2 and samples.summary().labelled == 0
        right = samples.judge(first, True, "", NOW + 1)
        assert (right.label, right.correct, right.output) == ("Because.", True, " Because. ")
        wrong = samples.judge(second, False, "so", NOW + 2)
        assert (wrong.label, wrong.correct, wrong.id) == ("so", False, second)
        assert samples.summary().answers == 0 and samples.summary().labelled == 2 and samples.summary().wrong == 1
        assert samples.judgements(10) == [False, True]
        assert samples.judge(first, False, "", NOW + 3).label == ""  # somebody thinks again
        assert samples.judgements(10) == [False, False]
        assert [sample.id for sample in samples.newest(labelled=True)] == [second]


def test_the_same_answer_again_is_one() -> None:
    with opened() as samples:
        assert answered(samples, "Why?") == answered(samples, "Why?") != answered(samples, "Why?", "other")


def test_an_answer_that_becomes_a_sample_that_is_there_takes_its_place_and_its_past() -> None:
    with opened() as samples:
        samples.add([NewSample(input="Why?", label="so")], "import", NOW)
        (old,) = samples.newest()
        samples.note_use([old.id], "frame", 3)
        kept = answered(samples, "Why?")
        judged = samples.judge(kept, False, "so", NOW)
        assert (samples.summary().samples, judged.id, judged.used) == (1, kept, 1)


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda samples, kept: samples.judge(kept + 1, True, "", NOW), "no answer 2 is kept"),
        (lambda samples, kept: samples.judge(kept, False, " out\n", NOW), "then it was right"),
        (lambda samples, kept: samples.judge(kept, False, "x" * MAX_SAMPLE_BYTES, NOW), "65536 are possible"),
        (lambda samples, kept: samples.judge(kept, False, "\ud800", NOW), "is no character"),
    ],
)
def test_what_can_not_be_said_about_an_answer(judge: Callable[[Samples, int], object], words: str) -> None:
    with opened() as samples:
        kept = answered(samples, "Why?")
        with pytest.raises(BadRequest, match=words):
            judge(samples, kept)
        assert samples.summary().answers == 1


def test_an_imported_sample_is_no_answer_that_can_be_judged() -> None:
    with opened() as samples:
        samples.add(lines(1), "import", NOW)
        (sample,) = samples.newest()
        with pytest.raises(BadRequest, match="no answer"):
            samples.judge(sample.id, True, "", NOW)


def test_what_is_too_long_or_empty_is_not_kept() -> None:
    with opened() as samples:
        assert samples.keep_answer("x" * MAX_SAMPLE_BYTES, "y", NOW) is None
        assert samples.keep_answer("x", " \n", NOW) is None
        assert samples.keep_answer("", "y", NOW) is None
        assert samples.summary().samples == 0


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (NewSample(input=" ", label="a"), "input of a sample is empty"),
        (NewSample(input="a", label=""), "label of a sample is empty"),
        (NewSample(input="é" * MAX_SAMPLE_BYTES, label="a"), "131073 bytes; 65536 are possible"),
        (NewSample(input="a\udfff", label="a"), "character 1 of a text is no character"),
    ],
)
def test_nothing_is_taken_when_one_sample_is_none(sample: NewSample, words: str) -> None:
    with opened() as samples:
        with pytest.raises(BadRequest, match=words):
            samples.add([*lines(3), sample], "import", NOW)
        assert samples.summary().samples == 0


def test_duplicates_are_one_sample_and_take_what_is_new() -> None:
    with opened() as samples:
        assert samples.add([*lines(3), *lines(3)], "import", NOW).new == 3
        added = samples.add(lines(2, correct=False), "import", NOW + 5)
        assert (added.new, added.known) == (0, 2)
        newest = list(samples.newest())
        assert [(sample.input, sample.correct) for sample in newest] == [
            ("text 1", False),
            ("text 0", False),
            ("text 2", None),
        ]
        assert samples.add(lines(1, "b"), "import", NOW).new == 1, "another label is another sample"


# ---------------------------------------------------------------- room


def test_answers_that_nobody_judges_make_room_for_new_ones() -> None:
    with opened() as samples:
        first = answered(samples, "first")
        judged = answered(samples, "judged")
        samples.judge(judged, False, "", NOW)
        for number in range(MAX_ANSWERS):
            samples.keep_answer(f"text {number}", "out", NOW + number + 1)
        assert samples.summary().answers == MAX_ANSWERS
        assert not samples.find(str(first)) and samples.find(str(judged))


def test_the_least_useful_of_the_largest_class_go_first() -> None:
    with opened(limits=Limits(samples=6, size_bytes=1 << 20)) as samples:
        samples.add([NewSample(input="rare", label="b")], "import", NOW - 100)
        samples.add([NewSample(input="hard", label="a", correct=False)], "import", NOW - 90)
        samples.add(lines(2), "import", NOW)
        (easy, _) = (sample.id for sample in samples.newest(2))
        samples.note_results({easy: Result(missed=False, loss=0.0)})
        kept = answered(samples, "Why?")
        assert samples.add(lines(2, start=2), "import", NOW + 1).evicted == 1
        assert not samples.find(str(kept)), "an answer that nobody has judged is worth least"
        assert samples.add(lines(1, start=4), "import", NOW + 2).evicted == 1
        left = {sample.input for sample in samples.newest()}
        assert left == {"rare", "hard", "text 0", "text 2", "text 3", "text 4"}


def test_bytes_are_bounded_and_the_answer_at_hand_stays() -> None:
    with opened(limits=Limits(samples=100, size_bytes=2000)) as samples:
        samples.add(lines(60), "import", NOW)
        assert samples.summary().size_bytes <= 2000
        kept = samples.keep_answer("x" * 1500, "out", NOW)
        assert kept is not None and samples.find(str(kept)) and samples.summary().size_bytes <= 2000


# ---------------------------------------------------------------- the cover


def bytes_of(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    with opened(tmp_path / "data" / "samples.sqlite") as samples:
        samples.add(lines(1), "import", NOW)
        assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "data").iterdir())


def test_encrypted_with_the_nodes_key_and_back(tmp_path: Path) -> None:
    path = tmp_path / "samples.sqlite"
    with opened(path) as samples:
        samples.add([NewSample(input="the goose is back", label="bearing-fault")], "import", NOW)
        (before,) = samples.newest()
    assert b"goose" in bytes_of(path) and not is_sealed(path)
    with opened(path, encrypt=True) as samples:
        assert list(samples.newest()) == [before]
        assert samples.add([NewSample(input="the goose is back", label="bearing-fault")], "import", NOW).known == 1
        samples.add([NewSample(input="the heron sleeps", label="pump-fault")], "import", NOW)
        assert samples.summary().encrypted
        found = bytes_of(path)
    for word in (b"goose", b"bearing", b"heron", b"pump", KEY):
        assert word not in found and word not in bytes_of(path)
    assert is_sealed(path)
    with Samples(path, ROOM, key) as samples:
        assert samples.summary().samples == 2, "as it is"
    with Samples(path, ROOM, key, encrypt=False) as samples:
        assert not samples.summary().encrypted
    with opened(path) as samples:
        assert {sample.input for sample in samples.newest()} == {"the goose is back", "the heron sleeps"}


def test_the_key_of_another_node_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "samples.sqlite"
    opened(path, encrypt=True).close()
    for wrong in (samples_key(b"s" * 32, "other"), samples_key(b"t" * 32, "net")):
        with pytest.raises(ConfigError, match=f"{path} is encrypted with the key of another node or network"):
            Samples(path, ROOM, lambda wrong=wrong: wrong)  # type: ignore[misc]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.sqlite"
    with opened(path) as samples:
        samples.add(lines(1), "import", NOW)
        samples._db.execute("UPDATE samples SET body = ?", (b"[1,",))
        with pytest.raises(DiskError, match="meshnode data forget 1"):
            list(samples.newest())
        assert samples.forget([1], NOW).samples == 1


# ---------------------------------------------------------------- training


def test_the_choice_is_the_same_for_a_seed_and_leaves_out_what_is_held_out(rng: random.Random) -> None:
    with opened() as samples:
        samples.add([*lines(30, "a"), *lines(30, "b", start=30), *lines(2, "c", start=60)], "import", NOW)
        held_out = {(f"text {n}", "a") for n in range(25)}
        seed = rng.getrandbits(32)
        chosen = samples.select(12, seed, held_out)
        assert chosen == samples.select(12, seed, held_out)
        assert sorted(sample.label for sample in chosen) == ["a"] * 5 + ["b"] * 5 + ["c"] * 2
        assert not held_out & {(sample.input, sample.label) for sample in chosen}
        assert len(samples.select(1000, seed)) == 62


def test_what_the_model_gets_wrong_comes_first_and_does_not_come_for_ever() -> None:
    with opened() as samples:
        samples.add(lines(4), "import", NOW)
        ids = {sample.input: sample.id for sample in samples.newest()}
        results = {"text 0": (False, 0.01), "text 1": (True, 2.0), "text 2": (False, 0.9), "text 3": (True, 1.0)}
        samples.note_results({ids[name]: Result(missed=m, loss=x) for name, (m, x) in results.items()})
        assert [sample.input for sample in samples.select(4, 1)] == ["text 1", "text 3", "text 2", "text 0"]
        samples.note_use([ids["text 1"]], "frame", 1)
        assert [sample.input for sample in samples.select(2, 1)] == ["text 3", "text 1"]
        assert samples.summary().fresh == 3 and samples.summary().wrong == 2


def test_what_was_answered_wrongly_counts_until_the_model_was_looked_at() -> None:
    with opened() as samples:
        samples.add([*lines(5), NewSample(input="hard", label="a", correct=False)], "import", NOW)
        assert samples.select(1, 1)[0].input == "hard"


def test_a_draw_asks_nothing_but_chance(rng: random.Random) -> None:
    with opened() as samples:
        samples.add([*lines(500, "a"), *lines(20, "b", start=500, correct=False)], "import", NOW)
        answered(samples, "Why?")
        drawn = [samples.draw(0.1, rng) for _ in range(100)]
        assert samples.draw(0, rng) == () and len(samples.draw(1, rng)) == 520
    sizes = [len(draw) for draw in drawn]
    print(f"{min(sizes)} to {max(sizes)} of 520 in a draw, 52 expected")
    assert 4680 < sum(sizes) < 5720 and len(set(sizes)) > 5
    hard = sum(sample.label == "b" for draw in drawn for sample in draw)
    assert 120 < hard < 290, "200 expected: what is wrong is drawn no more often"


# ---------------------------------------------------------------- forgetting


def test_forgotten_is_forgotten_and_its_traces_are_told(tmp_path: Path) -> None:
    path = tmp_path / "samples.sqlite"
    with opened(path) as samples:
        samples.add([NewSample(input="a secret thing", label="hush"), *lines(2)], "import", NOW)
        ids = {sample.input: sample.id for sample in samples.newest()}
        secret = ids["a secret thing"]
        for lineage, rounds in (("frame1", (4, 5, 5, 9)), ("frame2", (2,))):
            for number in rounds:
                samples.note_use([secret], lineage, number)
        samples.note_use([ids["text 0"]], "frame1", 12)
        told = samples.forget([secret, ids["text 0"], 999], NOW)
        assert told.samples == 2
        assert told.windows == (
            Window(lineage="frame1", first=4, last=12, rounds=4),
            Window(lineage="frame2", first=2, last=2, rounds=1),
        )
        assert [sample.input for sample in samples.select(10, 1)] == ["text 1"]
        assert b"a secret thing" not in bytes_of(path)
        added = samples.add([NewSample(input="a secret thing", label="hush"), *lines(2)], "import", NOW)
        assert (added.new, added.known, added.forgotten) == (0, 1, 2)
        assert samples.add([NewSample(input="a secret thing", label="hush")], "import", NOW, again=True).new == 1
        assert samples.add([NewSample(input="a secret thing", label="hush")], "import", NOW).known == 1
    assert b"hush" in bytes_of(path)


def test_samples_are_found_by_number_and_by_hash() -> None:
    with opened() as samples:
        samples.add(lines(3), "import", NOW)
        first = next(samples.newest())
        assert samples.find(str(first.id)) == samples.find(first.hash) == samples.find(first.hash[:8].upper())
        assert samples.find(first.hash[:7]) == () == samples.find("") == samples.find("no")


def test_an_id_is_never_given_twice() -> None:
    with opened() as samples:
        first = answered(samples, "one")
        samples.forget([first], NOW)
        assert answered(samples, "two") > first


KILLED = """
import sys
from pathlib import Path
from meshnode.state.samples import Samples
from meshnode.state.samples_port import Limits, NewSample
with Samples(Path(sys.argv[1]), Limits(samples=100, size_bytes=1 << 20), lambda: b"") as samples:
    samples.add([NewSample(input="whole", label="a")], "import", 1)
    def more():
        yield NewSample(input="half", label="a")
        print("now", flush=True)
        sys.stdin.read()
    samples.add(more(), "import", 1)
"""


def test_kill_9_in_the_middle_of_a_write(tmp_path: Path) -> None:
    path = tmp_path / "samples.sqlite"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "now\n"
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    with opened(path) as samples:
        assert [sample.input for sample in samples.newest()] == ["whole"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "samples.sqlite") as samples:
        samples.add(lines(1), "import", NOW)
        samples._db.execute("PRAGMA max_page_count=1")
        with pytest.raises(DiskError, match=r"file of samples .* Free some disk space"):
            samples.add([NewSample(input="x" * 60_000, label="a")], "import", NOW)
        assert samples.summary().samples == 1


def test_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "samples.sqlite").write_bytes(b"this is no database, and long enough" * 100)
    with pytest.raises(DiskError, match=r"samples\.sqlite"):
        opened(tmp_path / "samples.sqlite")
