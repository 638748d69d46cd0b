"""Files of samples that people bring: what is read, and which line is named when it can't be."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from meshnode.state.sample_files import MAX_FAULTS, MAX_LINE_BYTES, Faults, Kind, read_samples, write_samples
from meshnode.state.samples import Samples
from meshnode.state.samples_port import MAX_SAMPLE_BYTES, Limits, NewSample


def read(data: str | bytes, kind: Kind = "jsonl") -> list[tuple[int, NewSample]]:
    file = io.BytesIO(data if isinstance(data, bytes) else data.encode())
    return [(line.number, line.sample) for line in read_samples(file, "FILE", kind)]


def test_lines_of_json() -> None:
    data = (
        '\ufeff{"input": "a", "label": "x"}\n\n  \n{"input":"b é","label":"y","output":"z","correct":false,"team":1}'
    )
    assert read(data) == [
        (1, NewSample(input="a", label="x")),
        (4, NewSample(input="b é", label="y", output="z", correct=False)),
    ]


@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_tables(comma: str) -> None:
    rows = ["Label|input|id|correct", 'x|"a ""quoted""', 'text"|1|', "", "y|b|2|wrong"]
    data = "\r\n".join(rows).replace("|", comma)
    assert read(data, "csv") == [
        (2, NewSample(input='a "quoted"\r\ntext', label="x")),
        (5, NewSample(input="b", label="y", correct=False)),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
        ('{"input": ' + "9" * 5000 + "}", "line 2: no JSON"),
        ("[1]", 'line 2: it is no object like {"input": "...", "label": "..."}'),
        ('"text"', "line 2: text"),
        ('{"label": "x"}', "line 2: there is no input"),
        ('{"input": "a"}', "line 2: there is no label"),
        ('{"input": "a", "label": 7}', "line 2: label is 7, and no text"),
        ('{"input": "a", "label": null}', "line 2: label is null, and no text"),
        ('{"input": "a", "label": " "}', "line 2: the label of a sample is empty"),
        ('{"input": "a", "label": "x", "correct": "yes"}', 'line 2: correct is "yes"; it takes true or false'),
        ('{"input": "\\ud800", "label": "x"}', "line 2: character 0 of a text is no character"),
        (json.dumps({"input": "x" * MAX_SAMPLE_BYTES, "label": "x"}), "line 2: a sample has 65537 bytes; 65536"),
        ("x" * (MAX_LINE_BYTES + 1), "line 2 has more than 1048576 bytes"),
    ],
)
def test_a_line_that_is_wrong_is_named(line: str, words: str) -> None:
    with pytest.raises(Faults) as caught:
        read('{"input": "a", "label": "x"}\n' + line + "\n")
    assert words in str(caught.value) and "FILE" in str(caught.value)


def test_bytes_that_are_no_text_are_named() -> None:
    with pytest.raises(Faults, match=r"FILE: line 2 is no UTF-8 text \(byte 3 of it\)"):
        read(b'{"input": "a", "label": "x"}\n{"\xff\n')


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("a,b\n1,2\n", "FILE has no columns called input and label"),
        ("", "FILE has no columns"),
        ("input,label,input\n1,2,3\n", "two columns of the same name"),
        ("input,label\n1,2,3\n", "line 2: 3 cells where the first line names 2 columns"),
        ('input,label\n"a,x\n', "FILE is no CSV from line 2 on"),
        ('input,label\n"a"b,x\n', "FILE is no CSV from line 2 on"),
        ("input,label,correct\na,x,maybe\n", 'line 2: correct is "maybe"; it takes true or false'),
        ("input,label\n", "FILE holds no samples"),
    ],
)
def test_a_table_that_is_wrong(table: str, words: str) -> None:
    with pytest.raises(Faults) as caught:
        read(table, "csv")
    assert words in str(caught.value)


def test_a_few_faults_are_named_and_then_the_file_is_given_up() -> None:
    with pytest.raises(Faults) as caught:
        read("{\n" * 3 + '{"input": "a", "label": "x"}\n')
    assert str(caught.value).count("\n") == 3 and "there may be more" not in str(caught.value)
    with pytest.raises(Faults) as caught:
        read("{\n" * 1_000_000)
    assert str(caught.value).count("\n") == MAX_FAULTS and "there may be more" in str(caught.value)


def test_an_empty_file_is_told() -> None:
    with pytest.raises(Faults, match="holds no samples"):
        read("\n\n")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_is_written_can_be_read(kind: Kind, tmp_path: Path) -> None:
    given = [
        NewSample(input=' "a",\n b\t', label="x;", output="é", correct=True),
        NewSample(input="=1+1", label="\u2028y", correct=False),
        NewSample(input="c", label="z"),
    ]
    with Samples(None, Limits(samples=9, size_bytes=9999), lambda: b"") as samples:
        samples.add(given, "import", 1_800_000_000_000)
        file = io.StringIO(newline="")
        assert write_samples(samples.newest(), file, kind) == 3
    assert [sample for _, sample in read(file.getvalue(), kind)] == given[::-1]
    assert "2027-01-15T08:00:00+00:00" in file.getvalue()
