from __future__ import annotations

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import structlog

from meshnode.core import log
from meshnode.core.errors import DiskError

PEER = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_events_are_json_with_short_ids_and_without_secrets() -> None:
    out = io.StringIO()
    log.set_up(level="info", format="auto", stream=out)
    facts = {"prompt": "my diary", "deep": {"secret": "x"}, "data": b"abc", "peers": [PEER]}
    log.get_logger("test").info("peer.connected", peer=PEER, **facts)
    log.get_logger("test").debug("peer.seen", peer=PEER)
    (line,) = lines(out)
    assert line["event"] == "peer.connected"
    assert line["peer"] == "12D3…KPH5"
    assert line["peers"] == ["12D3…KPH5"]
    assert line["data"] == "(3 bytes)"
    assert "diary" not in out.getvalue()
    assert line["deep"] == {"secret": "(not logged)"}


def test_debug_shows_whole_ids() -> None:
    out = io.StringIO()
    log.set_up(level="debug", format="json", stream=out)
    log.get_logger("test").debug("peer.seen", peer=PEER)
    assert lines(out)[0]["peer"] == PEER


def test_an_exception_comes_with_its_traceback() -> None:
    out = io.StringIO()
    log.set_up(level="info", format="json", stream=out)
    try:
        raise ValueError("broken")
    except ValueError:
        log.get_logger("test").exception("handler.failed")
    assert "ValueError: broken" in str(lines(out)[0]["exception"])


def test_repeats_are_collapsed_and_counted() -> None:
    now = [0.0]
    collapse = log.CollapseRepeats(lambda: now[0])

    def written(**event: object) -> dict[str, object] | None:
        try:
            return dict(collapse(None, "info", {"event": "a.seen", "level": "info", **event}))
        except structlog.DropEvent:
            return None

    assert written(n=1) is not None
    assert written(n=1) is None
    assert written(n=1) is None
    assert written(n=2) is not None
    assert written(n=1, level="debug") is not None
    now[0] = log.REPEAT_S
    again = written(n=1)
    assert again is not None
    assert again["repeated"] == 2
    for n in range(1000):
        written(n=n)
    assert len(collapse._seen) <= 256


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "node.log"
    log.set_up(level="info", format="auto", file=path)
    log.get_logger("test").info("node.started")
    log.set_up(level="info", format="json", file=path)
    log.get_logger("test").info("node.stopped")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["node.started", "node.stopped"]
    with pytest.raises(DiskError, match="can't be written"):
        log.set_up(level="info", format="json", file=tmp_path)


def test_every_event_is_named_noun_verb() -> None:
    """What is logged anywhere in the runtime is `noun.verb_past`, a constant, with the facts as fields."""
    root = Path(log.__file__).parents[1]
    wrong = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("debug", "info", "warning", "error", "exception")
                and ast.unparse(node.func.value).rpartition(".")[2] in ("_log", "log")
            ):
                name = node.args[0] if node.args else None
                if not (isinstance(name, ast.Constant) and re.fullmatch(r"[a-z_]+\.[a-z_]+", str(name.value))):
                    wrong.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not wrong, "\n".join(wrong)


WORDS = {
    "ESC": "\x1b]0;title\x07",
    "C1": "\x9b31m",
    "direction mark": "\u202eabc",
    "line end": "a\nb",
    "tag": "\U000e0041",
}


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("shape", ["{}", "{} x", "12D3KooW{}", "bafy{}"])
def test_words_of_a_peer_steer_no_terminal(form: str, word: str, shape: str) -> None:
    out = io.StringIO()
    log.set_up(level="info", format=form, stream=out)
    text = shape.format(WORDS[word])
    logger = log.get_logger("test")
    logger.info("route.retried", reason=text, several=[text, {text: text}])
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("route.failed", error=text)
    lines = out.getvalue()
    assert "test" in lines
    assert all(c.isprintable() or c == "\n" or c == "\t" for c in lines), ascii(lines)
    if word != "line end":
        assert WORDS[word] not in lines


def test_a_flood_of_events_is_no_flood_of_lines() -> None:
    now = 0.0
    collapse = log.CollapseRepeats(lambda: now)
    written = []

    def write(**fields: object) -> None:
        with suppress(structlog.DropEvent):
            written.append(collapse(None, "info", {"level": "info", **fields}))

    for number in range(10_000):
        write(event="peer.refused", peer=f"p{number}")
    assert len(written) == log.BURST
    write(event="chain.changed")
    assert len(written) == log.BURST + 1, "other events are still written"
    now = log.REPEAT_S
    write(event="peer.refused", peer="another")
    assert written[-1]["suppressed"] == 10_000 - log.BURST


def test_a_log_file_is_set_aside_when_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_FILE_BYTES", 2_000)
    file = tmp_path / "logs" / "node.log"
    for start in range(2):  # a restart goes on with the same files
        log.set_up(level="info", format="json", file=file)
        for number in range(100):
            log.get_logger("test").info(f"event{start}-{number}.happened")
    names = sorted(path.name for path in file.parent.iterdir())
    assert names == ["node.log", "node.log.1", "node.log.2", "node.log.3"]
    assert all(path.stat().st_size <= 2_000 for path in file.parent.iterdir())
    assert "event1-99" in file.read_text()
    assert "event1-98" in (file.parent / "node.log.1").read_text() + file.read_text()
