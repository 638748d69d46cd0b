"""Settings merged once: TOML file < environment < flags. Nothing here reads the environment or a file at import.

Environment: MESHNODE_SECTION__KEY, e.g. MESHNODE_SERVE__MEMORY=800MB; lists are comma-separated.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from meshnode.config.settings import Config
from meshnode.config.values import IPFS_API_EXAMPLE, Amount
from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths
from meshnode.core.reasons import cause

PREFIX: Final = "MESHNODE_"

_SECTIONS: Final[dict[str, type[Any]]] = {
    name: kind for name, kind in typing.get_type_hints(Config).items() if name not in ("paths", "origins")
}
_KEYS: Final = {f"{section}.{f.name}": f for section, kind in _SECTIONS.items() for f in dataclasses.fields(kind)}


def load_config(folder: Path, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Config:
    """Read config.toml of the data folder (it may be missing), the environment and the flags.

    Args:
      overrides: flags, "serve.memory" -> value; a value of None means that the flag was not given.

    Raises:
      ConfigError: an unknown key or a value that can't be used; names the place, the key and what is allowed.
    """
    paths = Paths(folder)
    found: dict[str, tuple[object, str]] = {}
    for key, value in _read_file(paths.config).items():
        found[key] = (value, str(paths.config))
    for variable, text in sorted(environ.items()):
        if variable.startswith(PREFIX) and "__" in variable:
            section, _, name = variable[len(PREFIX) :].lower().partition("__")
            found[_known(f"{section}.{name}", f"the environment variable {variable}")] = (
                text,
                f"the environment variable {variable}",
            )
    for key, value in (overrides or {}).items():
        if value is not None:
            found[_known(key, "the command line")] = (value, "the command line")
    sections: dict[str, dict[str, object]] = {name: {} for name in _SECTIONS}
    for key, (value, origin) in found.items():
        section, _, name = key.partition(".")
        try:
            sections[section][name] = _KEYS[key].metadata["read"](value)
        except ValueError as error:
            raise ConfigError(f"{key} in {origin}: {error}.") from None
    config = Config(
        paths=paths,
        origins={key: origin for key, (_, origin) in found.items()},
        **{name: kind(**sections[name]) for name, kind in _SECTIONS.items()},
    )
    if config.content.ipfs_publish and not config.content.ipfs_api:
        raise ConfigError(
            f"content.ipfs_publish in {config.origins['content.ipfs_publish']}: there is no IPFS daemon that could "
            f"keep the files; set content.ipfs_api to its RPC, like {IPFS_API_EXAMPLE}, or ipfs_publish to false."
        )
    return config


def _read_file(path: Path) -> dict[str, object]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        raise ConfigError(
            f"{path.parent} is a file, or lies in one, so it can't be a data folder; choose another with --data or "
            "$MESHNODE_DATA."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {cause(error)}.") from error
    except ValueError as error:  # a number of 5,000 digits is a plain one
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid TOML: it is nested too deeply.") from error
    found: dict[str, object] = {}
    for section, table in document.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section!r} stands outside a section; write it under one of {_brackets()}.")
        if section not in _SECTIONS:
            raise ConfigError(f"{path}: there is no section [{section}]{_nearest(section, _SECTIONS)}.")
        for name, value in table.items():
            found[_known(f"{section}.{name}", str(path))] = value
    return found


def _known(key: str, origin: str) -> str:
    if key not in _KEYS:
        raise ConfigError(f"{origin}: there is no setting {key}{_nearest(key, _KEYS)}.")
    return key


def _nearest(word: str, known: Mapping[str, object]) -> str:
    name = word.rpartition(".")[2]
    elsewhere = [key for key in known if "." in word and key.endswith(f".{name}")]  # right, in the wrong section
    near = elsewhere or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else f"; there are {', '.join(known)}"


def _brackets() -> str:
    return ", ".join(f"[{name}]" for name in _SECTIONS)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Amount):
        return json.dumps(str(value)) if value.percent is not None else str(value)
    return json.dumps(value, ensure_ascii=False)


def describe(config: Config) -> str:
    """The effective settings as a valid config.toml: each with its reason and where its value came from."""
    lines: list[str] = []
    for section, kind in _SECTIONS.items():
        lines += ["", f"[{section}]"]
        for f in dataclasses.fields(kind):
            value = getattr(getattr(config, section), f.name)
            origin = config.origins.get(f"{section}.{f.name}", "default")
            lines += [f"# {f.metadata['why']}", f"{f.name} = {_toml(value)}  # {origin}"]
    return "\n".join([f"# {config.paths.config}", *lines, ""])
