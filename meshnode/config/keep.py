"""Keeps settings that were given once, as flags, for every later start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meshnode.core.errors import DiskError
from meshnode.core.paths import Paths


def keep_settings(folder: Path, values: Mapping[str, object]) -> None:
    """Write settings ("serve.memory" -> value) into a new config.toml; one that exists stays as it is.

    Raises DiskError.
    """
    path = Paths(folder).config
    if not values or path.exists():
        return
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {_toml(value)}")
    text = "\n".join(line for section, lines in sections.items() for line in (f"[{section}]", *lines, ""))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{path} can't be written: {error.strerror or error}") from error


def _toml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)
