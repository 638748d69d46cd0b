"""What the owner of a node can set. TOML file < environment < flags, merged once by `load_config`.

Every setting stands on one line with its default, how it is read (type, unit, range) and why it is so.
Environment: MESHNODE_SECTION__KEY, e.g. MESHNODE_SERVE__MEMORY=800MB; lists are comma-separated.
Nothing here reads the environment or a file at import.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import re
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths

T = TypeVar("T")

PREFIX: Final = "MESHNODE_"
DEFAULT_PORT: Final = 4331  # unassigned by IANA; fixed, so that a firewall rule and a ticket stay valid
DIRECT_PORT: Final = 4332
MAX_GATEWAYS: Final = 16

_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    **{name: 1000**power for power, letter in enumerate("kmgt", 1) for name in (letter, f"{letter}b")},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_PERCENT = re.compile(r"([0-9]{1,3})\s*%")
_URL = re.compile(
    r"https?://(?:[a-z0-9.\-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?(?:/[a-z0-9._~\-/]{0,200})?", re.I
)


def parse_size(text: str | int) -> int:
    """Bytes of "40MB" (decimal units), "1.5GiB" (binary units), "4096" or 4096.

    Raises ValueError with a sentence for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"{text} is negative; a size is 0 or more, like 40MB or 1.5GiB")
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 40MB, 1.5GiB or 4096")
    size: int = round(float(match[1]) * _UNITS[match[2].lower()])
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is more than any disk holds")
    return size


def format_size(size: int) -> str:
    """Bytes for people: 98.6MB."""
    for unit, factor in (("TB", 1000**4), ("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if size >= factor:
            return f"{size / factor:.3g}{unit}" if size < 1000 * factor else f"{size // factor}{unit}"
    return f"{size}B"


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes, or a percentage of something that is known only at run time."""

    size_bytes: int = 0
    percent: int | None = None

    def of(self, whole_bytes: int) -> int:
        """The amount in bytes; `whole_bytes` is what a percentage refers to."""
        return self.size_bytes if self.percent is None else whole_bytes * self.percent // 100

    @property
    def off(self) -> bool:
        return self.size_bytes == 0 and not self.percent

    def __str__(self) -> str:
        return f"{self.percent}%" if self.percent is not None else str(self.size_bytes)


def parse_amount(value: object) -> Amount:
    """An `Amount` of "800MB", "50%" or 0. Raises ValueError with a sentence."""
    if isinstance(value, Amount):
        return value
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        if int(match[1]) > 100:
            raise ValueError(f"{value} is more than everything; allowed are 0% to 100%")
        return Amount(percent=int(match[1]))
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return Amount(size_bytes=parse_size(value))
        except ValueError:
            pass
    raise ValueError(f"{_said(value)} is not an amount; write it like 800MB, 50% or 0")


def _said(value: object) -> str:
    """A value as it stands in a configuration file."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _size(value: object) -> int:
    if isinstance(value, (str, int)):
        return parse_size(value)
    raise ValueError(f"{_said(value)} is not a size; write it like 40MB, 1.5GiB or 4096")


def _text(limit: int) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{_said(value)} is not a text")
        if len(value.encode()) > limit or not value.isprintable():
            raise ValueError(f"{_said(value)} is not a printable text of at most {limit} bytes")
        return value

    return read


def _path(value: object) -> str:
    path = _text(1024)(value)
    if path and not path.startswith("/"):
        raise ValueError(f"{path!r} is not the whole path of a file, which begins with /")
    return path


def _number(low: int, high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{_said(value)} is not a whole number from {low} to {high}")
        return value

    return read


def _one_of(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"{_said(value)} is none of {', '.join(choices)}")
        return str(value)

    return read


def _yes_or_no(value: object) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true"):
        return True
    if word in (False, "false"):
        return False
    raise ValueError(f"{_said(value)} is neither true nor false")


def _multiaddrs(last: str, example: str, *, lowest_port: int = 0) -> Callable[[object], tuple[str, ...]]:
    pattern = re.compile(rf"/(?:ip4|ip6|dns|dns4|dns6)/[^/\s,]+/tcp/[0-9]{{1,5}}{last}")

    def read(value: object) -> tuple[str, ...]:
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{_said(value)} is not a list of addresses like {example}")
        for item in items:
            if not isinstance(item, str) or not pattern.fullmatch(item):
                raise ValueError(_no_multiaddr(item, example))
            _, kind, host, _, port, *_ = item.split("/")
            if not lowest_port <= int(port) <= 65535:
                raise ValueError(f"{item!r} has the port {port}; {lowest_port} to 65535 are allowed")
            if kind in ("ip4", "ip6") and not _is_ip(host, int(kind[2])):
                raise ValueError(f"{item!r}: {host} is no IPv{kind[2]} address")
        return tuple(items)

    return read


def _no_multiaddr(item: object, example: str) -> str:
    """Why an address is not taken, with what a person can do who copied it from elsewhere."""
    words = f"{item!r} is not an address like {example}"
    if not isinstance(item, str):
        return words
    if item.rstrip("/").endswith(("...", "…")):
        return f"{item!r}: the dots stand for the rest of the peer id; write all of it, as its node shows it"
    if "dnsaddr" in item.split("/"):
        return f"{words}; {_TAKEN}, and /dnsaddr is not resolved: write one of the addresses that it stands for"
    if not _TRANSPORTS.isdisjoint(item.split("/")):
        return f"{words}; {_TAKEN}"
    return words


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def _daemon(value: object) -> str:
    items = _multiaddrs("", _IPFS_API, lowest_port=1)([value] if value else [])
    return items[0] if items else ""


def _gateways(value: object) -> tuple[str, ...]:
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > MAX_GATEWAYS:
        raise ValueError(f"{_said(value)} is not a list of at most {MAX_GATEWAYS} addresses like {_GATEWAY}")
    for item in items:
        if not isinstance(item, str) or not _URL.fullmatch(item) or not _has_port(item):
            raise ValueError(f"{item!r} is not an address like {_GATEWAY}, without user, query or fragment")
    return tuple(dict.fromkeys(item.rstrip("/") for item in items))


def _has_port(url: str) -> bool:
    """Whether the port of a URL, if it names one, is a possible port."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def setting(default: T, read: Callable[[object], T], why: str) -> T:
    """A field of a section: its default, its reader (raises ValueError with a sentence), its reason."""
    result: T = field(default=default, metadata={"read": read, "why": why})
    return result


_TAKEN = "only /tcp addresses with ip4, ip6, dns, dns4 or dns6 are taken, and nothing on top of TCP"
_TRANSPORTS = frozenset(
    ("udp", "quic", "quic-v1", "ws", "wss", "tls", "webtransport", "webrtc-direct", "p2p-circuit")
)
_LISTEN = "/ip4/0.0.0.0/tcp/4331"
_IPFS_API = "/ip4/127.0.0.1/tcp/5001"
_GATEWAY = "https://gateway.example"
_NAME = "/dns4/node.example/tcp/4331"
_PEER = "/ip4/192.0.2.7/tcp/4331/p2p/12D3KooW..."


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSection:
    name: str = setting("", _text(64), "what others see; empty: the computer's name")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSection:
    listen: tuple[str, ...] = setting(
        (_LISTEN,),
        _multiaddrs("", _LISTEN),
        "multiaddrs; a fixed port keeps tickets and firewall rules valid; /tcp/0 takes any free one",
    )
    direct_port: int = setting(
        DIRECT_PORT, _number(-1, 65535), "TCP port of the fast path for tokens and blocks; 0: any free one, -1: off"
    )
    announce: tuple[str, ...] = setting(
        (),
        _multiaddrs("", _NAME, lowest_port=1),
        "where others reach this node, if it can't see that itself: a forwarded port, a container's name; "
        "empty: the addresses of this machine",
    )
    bootstrap: tuple[str, ...] = setting(
        (),
        _multiaddrs("/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", _PEER),
        "peers to dial at the start, beside those of the ticket and those met before",
    )
    swarm_key: str = setting(
        "",
        _path,
        "swarm.key file of a private IPFS network: the same for all nodes here and for IPFS nodes they meet; empty: "
        "none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSection:
    memory: Amount = setting(
        Amount(percent=50),
        parse_amount,
        "bytes, or share of the memory free at the start, for weights and KV; half leaves room to work; 0: none",
    )
    layers: int = setting(0, _number(0, 1024), "most layers to hold; 0: as many as the memory takes")
    threads: int = setting(
        1, _number(1, 256), "of one engine step; decoding is bound by memory bandwidth, and the network needs a core"
    )
    sessions: int = setting(8, _number(1, 1024), "generations at once; more are refused with a retry time")
    kv_memory: Amount = setting(
        Amount(percent=25),
        parse_amount,
        "bytes, or share of serve.memory, for the KV of all sessions; the rest holds weights",
    )
    engine: str = setting(
        "onnx",
        _one_of("onnx", "null"),
        "null computes deterministic nonsense without a model, for tests of the mesh itself",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentSection:
    quota: Amount = setting(
        Amount(size_bytes=20_000_000_000),
        parse_amount,
        "bytes, or share of the free disk, for model files; unpinned files go first",
    )
    encrypt: bool = setting(
        False,
        _yes_or_no,
        "keep model files encrypted on the disk, with this node's key (a passphrase on it protects them, too); "
        "what is in use is in memory; takes effect at the next start",
    )
    replicas: int = setting(
        2,
        _number(1, 64),
        "copies of every file of the served model that the mesh keeps, if it has so many nodes; 1: no extra ones",
    )
    ipfs_api: str = setting(
        "",
        _daemon,
        f"the RPC of an IPFS daemon, like {_IPFS_API}, asked for what no peer gives; empty: none",
    )
    ipfs_publish: bool = setting(
        False,
        _yes_or_no,
        "also have the daemon of content.ipfs_api keep what this node holds of the served model, for all who ask it",
    )
    gateways: tuple[str, ...] = setting(
        (),
        _gateways,
        f"trustless gateways, like {_GATEWAY}, asked for what no peer gives; they learn what this node fetches",
    )
    ipfs_peers: tuple[str, ...] = setting(
        (),
        _multiaddrs("/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", _PEER),
        "IPFS nodes outside this network that are asked for what no member gives; they can do nothing else here",
    )
    share: str = setting(
        "members",
        _one_of("members", "guests", "anyone"),
        "who gets the files of this node; guests: the nodes of content.ipfs_peers, too; anyone: everybody who "
        "connects, as on IPFS",
    )
    dht: tuple[str, ...] = setting(
        (),
        _multiaddrs("/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", _PEER, lowest_port=1),
        "peers of a Kademlia DHT, like the one of IPFS, asked who has what nobody known gives; with content.share = "
        "anyone they are told what this node gives; empty: none; they learn what this node fetches",
    )
    dht_serve: bool = setting(
        False,
        _yes_or_no,
        "also answer the questions of others in the DHT and keep their provider records, for up to 48 h",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    level: str = setting(
        "info", _one_of("debug", "info", "warning", "error"), "info is about one line a minute when nothing happens"
    )
    format: str = setting("auto", _one_of("auto", "console", "json"), "auto: console on a terminal, json elsewhere")
    file: str = setting("", _text(4096), "path, relative to the data folder; empty: standard error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The effective settings of one node and where each came from."""

    paths: Paths
    node: NodeSection = NodeSection()
    network: NetworkSection = NetworkSection()
    serve: ServeSection = ServeSection()
    content: ContentSection = ContentSection()
    log: LogSection = LogSection()
    origins: Mapping[str, str] = field(default_factory=dict)  # "serve.memory" -> "the command line"; absent: default


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
            f"keep the files; set content.ipfs_api to its RPC, like {_IPFS_API}, or ipfs_publish to false."
        )
    return config


def _read_file(path: Path) -> dict[str, object]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
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
