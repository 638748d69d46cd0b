"""Samples in files of people: one JSON object a line, or CSV with a header. Read line by line, within limits.

A line has an `input` (the prompt as the model is to see it, up to where the answer begins) and a `label` (the right
answer); `output` (what the model said) and `correct` (whether that was right) may be there. Others are left alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final, Literal, TextIO

from meshnode.core.errors import BadRequest, ConfigError
from meshnode.state.samples_port import NewSample, Sample, check_sample

MAX_FILE_BYTES: Final = 1 << 30
MAX_LINE_BYTES: Final = 1 << 20  # a whole sample in JSON, every character of it spelt out as \\u0000
MAX_FAULTS: Final = 5  # lines that are named before the file is given up

Kind = Literal["jsonl", "csv"]
_FIELDS: Final = ("input", "label", "output", "correct")
_WORDS: Final = {"true": True, "1": True, "right": True, "false": False, "0": False, "wrong": False, "": None}


class Faults(ConfigError):
    """A file that can't be used, with the lines that are wrong."""


@dataclass(frozen=True, slots=True)
class Line:
    """One sample of a file; `number` counts from 1, `end` is the byte behind it."""

    number: int
    end: int
    sample: NewSample


def read_samples(file: BinaryIO, name: str, kind: Kind) -> Iterator[Line]:
    """The samples of a file. Empty lines are left out.

    Raises Faults, after MAX_FAULTS lines or at the end of the file, with each line that is wrong and why.
    """
    faults: list[str] = []
    found = False
    reader = _Reader(file, name)
    rows = _objects(reader) if kind == "jsonl" else _rows(reader, name)
    for number, row in rows:
        found = True
        try:
            sample = _sample(row)
            check_sample(sample)
        except (BadRequest, ValueError) as error:
            faults.append(f"line {number}: {error}")
            if len(faults) >= MAX_FAULTS:
                break
            continue
        yield Line(number, reader.bytes, sample)
    if faults:
        more = ", and there may be more" if len(faults) >= MAX_FAULTS else ""
        raise Faults(f"{name} can't be used{more}:\n  " + "\n  ".join(faults))
    if not found:
        raise Faults(f"{name} holds no samples")


def write_samples(samples: Iterable[Sample], file: TextIO, kind: Kind) -> int:
    """Write samples so that `read_samples` reads them; how many there were. A label that nobody knows is empty."""
    fields = (*_FIELDS, "hash", "source", "time")
    table = csv.DictWriter(file, fields, lineterminator="\n") if kind == "csv" else None
    if table is not None:
        table.writeheader()
    count = 0
    for sample in samples:
        row = sample_json(sample)
        if table is not None:
            words = {True: "true", False: "false", None: ""}
            table.writerow({**{name: row[name] for name in fields}, "correct": words[sample.correct]})
        else:
            file.write(json.dumps({name: row[name] for name in fields}, ensure_ascii=False) + "\n")
        count += 1
    return count


def sample_json(sample: Sample) -> dict[str, Any]:
    """A sample as plain data."""
    return {
        "id": sample.id,
        "input": sample.input,
        "label": sample.label,
        "output": sample.output,
        "correct": sample.correct,
        "hash": sample.hash,
        "source": sample.source,
        "time": datetime.fromtimestamp(sample.time_ms / 1000, UTC).isoformat(timespec="seconds"),
        "used": sample.used,
    }


class _Reader:
    """Lines of a file as text; counts bytes and lines. Raises Faults for a line that is too long or no text."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.bytes = 0
        self.lines = 0

    def __iter__(self) -> Iterator[str]:
        while data := self._file.readline(MAX_LINE_BYTES + 1):
            self.lines += 1
            self.bytes += len(data)
            if len(data) > MAX_LINE_BYTES:
                raise Faults(
                    f"{self._name}: line {self.lines} has more than {MAX_LINE_BYTES} bytes; is it a file of samples?"
                )
            if self.bytes > MAX_FILE_BYTES:
                raise Faults(f"{self._name} has more than {MAX_FILE_BYTES} bytes; import it in parts")
            try:
                text = data.decode("utf-8-sig" if self.lines == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Faults(
                    f"{self._name}: line {self.lines} is no UTF-8 text (byte {error.start + 1} of it)"
                ) from error
            yield text


def _objects(reader: _Reader) -> Iterator[tuple[int, Any]]:
    for text in reader:
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                row = f"no JSON: {error}"
            yield reader.lines, row


def _rows(reader: _Reader, name: str) -> Iterator[tuple[int, Any]]:
    lines = iter(reader)
    header = next(lines, "")
    comma = next((mark for mark in ",;\t" if {"input", "label"} <= set(_header(header, mark))), None)
    if comma is None:
        raise Faults(
            f"{name} has no columns called input and label: its first line must name them, as in: input,label"
        )
    columns = _header(header, comma)
    if len(set(columns)) != len(columns):
        raise Faults(f"{name} has two columns of the same name")
    table = csv.reader(lines, delimiter=comma, strict=True)
    while True:
        first = reader.lines + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise Faults(f"{name} is no CSV from line {first} on: {error}") from error
        if not cells:
            continue
        if len(cells) != len(columns):
            yield first, f"{len(cells)} cells where the first line names {len(columns)} columns"
            continue
        row: dict[str, Any] = dict(zip(columns, cells, strict=True))
        word = row.get("correct", "").strip().lower()
        yield first, {**row, "correct": _WORDS.get(word, word)}


def _header(line: str, comma: str) -> list[str]:
    try:
        cells = next(csv.reader(io.StringIO(line), delimiter=comma), [])
    except csv.Error:
        return []
    return [cell.strip().lower() for cell in cells]


def _sample(row: Any) -> NewSample:
    """Raises ValueError with what is wrong."""
    if isinstance(row, str):
        raise ValueError(row)
    if not isinstance(row, Mapping):
        raise ValueError('it is no object like {"input": "...", "label": "..."}')
    for name in ("input", "label"):
        if name not in row:
            raise ValueError(f"there is no {name}")
    texts = {name: row.get(name, "") for name in ("input", "label", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is {json.dumps(text)[:40]}, and no text")
    correct = row.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise ValueError(f"correct is {json.dumps(correct)[:40]}; it takes true or false")
    return NewSample(correct=correct, **texts)
