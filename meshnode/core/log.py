"""Structured logs: events named `noun.verb_past`, facts as fields, one line each on stderr or in a file.

Levels: error = a person must act; warning = degraded, we cope; info = worth following; debug = everything.
Never logged: keys, secrets, tickets, prompts, answers, activations (`_PRIVATE`); raw bytes appear as their length.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger

from meshnode.core.errors import DiskError
from meshnode.core.printable import printable
from protocols.ids import short

REPEAT_S: Final = 10.0  # the same event with the same fields is written once in this time
BURST: Final = 50  # events of one name in this time
MAX_FILE_BYTES: Final = 8 << 20  # then a log file is set aside
KEPT_FILES: Final = 3  # set aside, as NAME.1 (the newest) to NAME.3
_REMEMBERED: Final = 256  # distinct events whose repeats are counted

# Field names that carry what people said to the model or what opens doors.
_WORDS = ("activations", "answer", "hidden", "logits", "messages", "prompt", "text", "token_ids")
_DOORS = ("invite", "key", "passphrase", "password", "private_key", "secret", "seed", "ticket")
_PRIVATE: Final = frozenset((*_WORDS, *_DOORS))
_ID_START: Final = ("12D3KooW", "bafk", "bafy")


def get_logger(noun: str) -> structlog.stdlib.BoundLogger:
    """The logger of one part; bind the peer, session or span that it is about."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(part=noun)
    return logger


class CollapseRepeats:
    """Drop an event that was written with the same fields in the last `REPEAT_S`; the next one says how often.

    Of events of one name, whatever their fields, `BURST` are written in that time: a flood of peers or records must
    not become a flood of lines.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seen: OrderedDict[tuple[str, ...], tuple[float, int]] = OrderedDict()
        self._bursts: dict[str, tuple[float, int]] = {}  # event name: (begin of its period, lines in it)

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        if event.get("level") == "debug":
            return event
        key = tuple(f"{name}={value!r}" for name, value in sorted(event.items()) if not isinstance(value, float))
        now = self._now()
        written, dropped = self._seen.get(key, (-REPEAT_S, 0))
        if now - written < REPEAT_S:
            self._seen[key] = (written, dropped + 1)
            raise structlog.DropEvent
        if more := self._count(str(event.get("event")), now):
            event["suppressed"] = more  # lines of this name in the period before
        self._seen[key] = (now, 0)
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        if dropped:
            event["repeated"] = dropped
        return event

    def _count(self, name: str, now: float) -> int:
        """How many lines of this name the last period has swallowed, when another begins. Raises DropEvent."""
        began, lines = self._bursts.get(name, (-REPEAT_S, 0))
        if now - began >= REPEAT_S:
            self._bursts[name] = (now, 1)
            return max(0, lines - BURST)
        self._bursts[name] = (began, lines + 1)
        if lines >= BURST:
            raise structlog.DropEvent
        return 0


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide what must not be written, shorten ids above debug, show bytes as their length."""
    full = event.get("level") == "debug"
    for name, value in event.items():
        event[name] = "(not logged)" if name in _PRIVATE else _plain(value, full)
    return event


def _plain(value: Any, full: bool) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"({len(value)} bytes)"
    if isinstance(value, str):
        return printable(short(value) if not full and value.startswith(_ID_START) and " " not in value else value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, full) for item in value]
    if isinstance(value, dict):
        return {printable(str(k)): "(not logged)" if k in _PRIVATE else _plain(v, full) for k, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float)) else printable(str(value))


def _plain_traceback(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The words of an exception may come from a peer, too."""
    if isinstance(text := event.get("exception"), str):
        event["exception"] = printable(text, keep="\n\t")
    return event


class _RotatingFile:
    """A log file that is set aside when it is large. Where that fails, it goes on growing: the log matters more."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._open()

    def _open(self) -> None:
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._bytes = self._path.stat().st_size

    def write(self, text: str) -> int:
        if self._bytes + len(text) > MAX_FILE_BYTES and self._bytes:
            self._set_aside()
        self._bytes += len(text.encode())
        return self._file.write(text)

    def _set_aside(self) -> None:
        self._file.close()
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, KEPT_FILES + 1))]
        with suppress(OSError):
            for newer, older in reversed(list(pairwise(names))):
                if newer.exists():
                    newer.replace(older)
        self._open()

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return False


def set_up(*, level: str, format: str, file: Path | None = None, stream: TextIO | None = None) -> None:
    """Configure the logs of this process, once, before anything is logged.

    Args:
      level: "debug", "info", "warning" or "error".
      format: "console", "json", or "auto" (console on a terminal, json elsewhere).
      file: append here instead of to `stream` (standard error by default); set aside when it is large.

    Raises:
      DiskError: the file can't be opened.
    """
    out = stream if stream is not None else sys.stderr
    if file is not None:
        try:
            out = cast("TextIO", _RotatingFile(file))
        except OSError as error:
            raise DiskError(f"The log file {file} can't be written: {error.strerror or error}.") from error
    console = format == "console" or (format == "auto" and out.isatty())
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=out.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            redact,
            CollapseRepeats(),
            structlog.processors.format_exc_info,
            _plain_traceback,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    # Libraries that log through the standard library say only what somebody must act on.
    logging.basicConfig(stream=out, level=logging.ERROR, format="%(levelname)s %(name)s %(message)s", force=True)
