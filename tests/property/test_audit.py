"""Whatever is done to an audit log, it is found out; and what nobody did anything to is as it was written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.health import Health
from meshnode.state.audit import CURRENT, AuditLog, ends_of, entries_of, older_files, verify_log
from meshnode.state.audit_chain import Link, read_line, write_line
from meshnode.state.memory_state import MemoryState

Damage = Callable[[st.DataObject, list[Path]], None]


def written(folder: Path, state: MemoryState, lines: int, *, max_bytes: int = 800, files: int = 4) -> None:
    log = AuditLog(folder, state, lambda: 1_700_000_000_000, Health(), max_bytes=max_bytes, files=files, text=False)
    for number in range(lines):
        log.note("http", "key phone", f"question {number}")


def flip(data: st.DataObject, files: list[Path]) -> None:
    path = data.draw(st.sampled_from(files))
    text = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(text)


def truncate(data: st.DataObject, files: list[Path]) -> None:
    path = data.draw(st.sampled_from(files))
    text = path.read_bytes()
    path.write_bytes(text[: data.draw(st.integers(0, len(text) - 1))])


def remove(data: st.DataObject, files: list[Path]) -> None:
    path = data.draw(st.sampled_from(files))
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[data.draw(st.integers(0, len(lines) - 1))]
    path.write_bytes(b"".join(lines))


def double(data: st.DataObject, files: list[Path]) -> None:
    path = data.draw(st.sampled_from(files))
    lines = path.read_bytes().splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 1))
    lines.insert(data.draw(st.integers(0, len(lines))), lines[at])
    path.write_bytes(b"".join(lines))


def swap(data: st.DataObject, files: list[Path]) -> None:
    places = [(path, at) for path in files for at in range(len(path.read_bytes().splitlines()))]
    (one, i), (other, j) = data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True))
    first, second = (path.read_bytes().splitlines(keepends=True) for path in (one, other))
    if one == other:
        first[i], first[j] = first[j], first[i]
    else:
        first[i], second[j] = second[j], first[i]
        other.write_bytes(b"".join(second))
    one.write_bytes(b"".join(first))


def delete(data: st.DataObject, files: list[Path]) -> None:
    data.draw(st.sampled_from(files)).unlink()


def forge(data: st.DataObject, files: list[Path]) -> None:
    """One line is written anew, with a hash that fits it."""
    path = data.draw(st.sampled_from(files))
    lines = path.read_bytes().splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 1))
    entry = read_line(lines[at][:-1])
    fields: dict[str, Any] = {**entry.fields, "who": "somebody else"}
    lines[at] = write_line(Link(entry.link.n - 1, entry.prev), fields)[0]
    path.write_bytes(b"".join(lines))


@given(st.data(), st.integers(2, 40), st.sampled_from([flip, truncate, remove, double, swap, delete, forge]))
def test_every_change_is_found_out(data: st.DataObject, lines: int, damage: Damage) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, state = Path(name), MemoryState()
        written(folder, state, lines)
        found = verify_log(folder, state)
        assert found.problems == ()
        damage(data, [*older_files(folder), folder / CURRENT])
        assert verify_log(folder, state).problems


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(2, 4), st.integers(300, 2000))
def test_it_goes_on_over_restarts_and_rotations(runs: list[int], files: int, max_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, state = Path(name), MemoryState()
        for lines in runs:
            written(folder, state, lines, max_bytes=max_bytes, files=files)
            assert verify_log(folder, state).problems == ()
        assert len(older_files(folder)) < files
        kept = [entry.link.n for entry in entries_of(folder)]
        assert kept == list(range(sum(runs) - len(kept) + 1, sum(runs) + 1))
        assert ends_of(state).head_n == sum(runs)


@given(st.data(), st.integers(1, 5))
def test_a_power_cut_in_the_middle_of_a_line_is_no_damage(data: st.DataObject, lines: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, state = Path(name), MemoryState()
        written(folder, state, lines, max_bytes=10_000)
        line, _ = write_line(ends_of(state).head, {"at": 1, "via": "http", "who": "x", "what": "y"})
        with (folder / CURRENT).open("ab") as file:
            file.write(line[: data.draw(st.integers(0, len(line)))])
        assert verify_log(folder, state).problems == ()  # as it is while a node writes
        written(folder, state, 2, max_bytes=10_000)
        assert verify_log(folder, state).problems == ()
