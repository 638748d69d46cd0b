"""How one setting is read: from TOML, an environment variable or a flag, with a sentence when it can't be."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import urlsplit

from meshnode.core.sizes import parse_size
from protocols.errors import RemoteProtocolError
from protocols.multiaddr import parse_address
from protocols.upstream.messages import MAX_MODELS, MAX_NAME

T = TypeVar("T")

MAX_GATEWAYS: Final = 16
MAX_ORIGINS: Final = 64
LEAST_RATE: Final = 64_000  # bytes a second: whoever waits 5 s for a byte gives a peer up (protocols/bitswap)

_HOURS = re.compile(r"([0-9]{1,2})(?::([0-5][0-9]))?\s*-\s*([0-9]{1,2})(?::([0-5][0-9]))?")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9.\-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?")
_HOST_PORT = re.compile(r"([0-9a-z.]{1,253}|\[[0-9a-fA-F:.]{2,45}\]):([0-9]{1,5})")
_PERCENT = re.compile(r"([0-9]{1,3})\s*%")
_URL = re.compile(
    r"https?://(?:[a-z0-9.\-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?(?:/[a-z0-9._~\-/]{0,200})?", re.I
)

_TAKEN = "only /tcp addresses with ip4, ip6, dns, dns4 or dns6 are taken, and nothing on top of TCP"
_TRANSPORTS = frozenset(
    ("udp", "quic", "quic-v1", "ws", "wss", "tls", "webtransport", "webrtc-direct", "p2p-circuit")
)
LISTEN_EXAMPLE = "/ip4/0.0.0.0/tcp/4331"
IPFS_API_EXAMPLE = "/ip4/127.0.0.1/tcp/5001"
HOURS_EXAMPLE = "22:00-6:30"
HTTP_EXAMPLE = "127.0.0.1:4333"
ORIGIN_EXAMPLE = "https://chat.example"
GATEWAY_EXAMPLE = "https://gateway.example"
NAME_EXAMPLE = "/dns4/node.example/tcp/4331"
OTLP_EXAMPLE = "http://127.0.0.1:4318"
UPSTREAM_EXAMPLE = "http://127.0.0.1:11434"
RATE_EXAMPLE = "2 MB/s"
PEER_EXAMPLE = "/ip4/192.0.2.7/tcp/4331/p2p/12D3KooW..."


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


def text(limit: int) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{_said(value)} is not a text")
        if len(value.encode()) > limit or not value.isprintable():
            raise ValueError(f"{_said(value)} is not a printable text of at most {limit} bytes")
        return value

    return read


def path(value: object) -> str:
    path = text(1024)(value)
    if path and not path.startswith("/"):
        raise ValueError(f"{path!r} is not the whole path of a file, which begins with /")
    return path


def number(low: int, high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{_said(value)} is not a whole number from {low} to {high}")
        return value

    return read


def real(low: float, high: float) -> Callable[[object], float]:
    def read(value: object) -> float:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?(e-?[0-9]{1,3})?", value.strip()):
            value = float(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{_said(value)} is not a number from {low:g} to {high:g}")
        return float(value)

    return read


def rate(value: object) -> int:
    """Bytes a second, of "2 MB/s" or 0."""
    text = value.strip() if isinstance(value, str) else value
    try:
        speed = _size(text[:-2] if isinstance(text, str) and text.endswith("/s") else text)
    except ValueError:
        raise ValueError(f"{_said(value)} is not a speed; write it like {RATE_EXAMPLE}, or 0 for no limit") from None
    if 0 < speed < LEAST_RATE:
        raise ValueError(f"{_said(value)} is less than 64 kB/s, at which others would take this node for stalled")
    return speed


def hours(value: object) -> str:
    if value == "" or (isinstance(value, str) and hours_of(value)):
        return value
    raise ValueError(f"{_said(value)} is not a part of the day like {HOURS_EXAMPLE}")


def hours_of(text: str) -> tuple[int, int] | None:
    """ "22:00-6:30" as minutes of the day, from and to; None for the whole day and for what is no part of one."""
    match = _HOURS.fullmatch(text.strip())
    if match is None:
        return None
    first, last = (int(match[at]) * 60 + int(match[at + 1] or 0) for at in (1, 3))
    return (first, last % 1440) if first < 1440 and last <= 1440 and first != last % 1440 else None


def one_of(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"{_said(value)} is none of {', '.join(choices)}")
        return str(value)

    return read


def yes_or_no(value: object) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true"):
        return True
    if word in (False, "false"):
        return False
    raise ValueError(f"{_said(value)} is neither true nor false")


def multiaddrs(last: str, example: str, *, lowest_port: int = 0) -> Callable[[object], tuple[str, ...]]:
    pattern = re.compile(rf"/(?:ip4|ip6|dns|dns4|dns6)/[^/\s,]+/tcp/[0-9]{{1,5}}{last}")

    def read(value: object) -> tuple[str, ...]:
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{_said(value)} is not a list of addresses like {example}")
        for item in items:
            if not isinstance(item, str) or not pattern.fullmatch(item):
                raise ValueError(_no_multiaddr(item, example))
            try:
                port = parse_address(item).port
            except RemoteProtocolError as error:
                raise ValueError(str(error)) from None
            if port < lowest_port:
                raise ValueError(f"{item!r} has the port {port}; {lowest_port} to 65535 are allowed")
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


def server_url(value: object) -> str:
    """The root of an HTTP server; "" for none."""
    if value == "":
        return ""
    if not isinstance(value, str) or not _URL.fullmatch(value) or not _has_port(value):
        raise ValueError(f"{_said(value)} is not an address like {UPSTREAM_EXAMPLE}, without user, query or fragment")
    return value.rstrip("/")


def model_names(value: object) -> tuple[str, ...]:
    """Names as a server has them: "llama3:8b"."""
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > MAX_MODELS:
        raise ValueError(f"{_said(value)} is not a list of at most {MAX_MODELS} names of models")
    for item in items:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_NAME or not item.isprintable() or "@" in item:
            raise ValueError(f"{item!r} is not the name of a model: 1 to {MAX_NAME} printable characters, no @")
    return tuple(dict.fromkeys(items))


def rpc_address(value: object) -> str:
    items = multiaddrs("", IPFS_API_EXAMPLE, lowest_port=1)([value] if value else [])
    return items[0] if items else ""


def host_port(value: object) -> str:
    match = _HOST_PORT.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"{_said(value)} is not an address like {HTTP_EXAMPLE}")
    try:
        host = ipaddress.ip_address(match[1].strip("[]"))
    except ValueError:
        if match[1] != "localhost":
            raise ValueError(f"{_said(value)}: {match[1]} is no IP address; write one, like {HTTP_EXAMPLE}") from None
        return str(value)
    if (host.version == 6) != match[1].startswith("["):
        raise ValueError(f"{_said(value)}: write an IPv6 address in brackets, and only that")
    return str(value)


def origins(value: object) -> tuple[str, ...]:
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > MAX_ORIGINS:
        raise ValueError(f"{_said(value)} is not a list of at most {MAX_ORIGINS} origins like {ORIGIN_EXAMPLE}")
    for item in items:
        if not isinstance(item, str) or not _ORIGIN.fullmatch(item):
            raise ValueError(f"{item!r} is no origin like {ORIGIN_EXAMPLE}: a scheme, a host and maybe a port")
    return tuple(dict.fromkeys(items))


def gateway_urls(value: object) -> tuple[str, ...]:
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > MAX_GATEWAYS:
        raise ValueError(f"{_said(value)} is not a list of at most {MAX_GATEWAYS} addresses like {GATEWAY_EXAMPLE}")
    for item in items:
        if not isinstance(item, str) or not _URL.fullmatch(item) or not _has_port(item):
            raise ValueError(f"{item!r} is not an address like {GATEWAY_EXAMPLE}, without user, query or fragment")
    return tuple(dict.fromkeys(item.rstrip("/") for item in items))


def url_or_none(value: object) -> str:
    """One address of a web service, or the empty text."""
    if value == "":
        return ""
    if not isinstance(value, str) or not _URL.fullmatch(value) or not _has_port(value):
        raise ValueError(f"{_said(value)} is not an address like {OTLP_EXAMPLE}, without user, query or fragment")
    return value.rstrip("/")


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
