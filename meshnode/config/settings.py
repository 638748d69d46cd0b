"""What the owner of a node can set: each setting on one line with its default, how it is read and why it is so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshnode.config.values import (
    GATEWAY_EXAMPLE,
    HOURS_EXAMPLE,
    HTTP_EXAMPLE,
    IPFS_API_EXAMPLE,
    LISTEN_EXAMPLE,
    NAME_EXAMPLE,
    ORIGIN_EXAMPLE,
    OTLP_EXAMPLE,
    PEER_EXAMPLE,
    RATE_EXAMPLE,
    UPSTREAM_EXAMPLE,
    Amount,
    gateway_urls,
    host_port,
    hours,
    model_names,
    multiaddrs,
    number,
    one_of,
    origins,
    parse_amount,
    path,
    rate,
    real,
    rpc_address,
    server_url,
    setting,
    text,
    url_or_none,
    yes_or_no,
)
from meshnode.core.paths import Paths

DEFAULT_PORT: Final = 4331  # unassigned by IANA; fixed, so that a firewall rule and a ticket stay valid


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSection:
    name: str = setting("", text(64), "what others see; empty: the computer's name")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSection:
    listen: tuple[str, ...] = setting(
        (LISTEN_EXAMPLE,),
        multiaddrs("", LISTEN_EXAMPLE),
        "multiaddrs; a fixed port keeps tickets and firewall rules valid; /tcp/0 takes any free one",
    )
    announce: tuple[str, ...] = setting(
        (),
        multiaddrs("", NAME_EXAMPLE, lowest_port=1),
        "where others reach this node, if it can't see that itself: a forwarded port, a container's name; "
        "empty: the addresses of this machine",
    )
    bootstrap: tuple[str, ...] = setting(
        (),
        multiaddrs("/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", PEER_EXAMPLE),
        "peers to dial at the start, beside those of the ticket and those met before",
    )
    local_discovery: bool = setting(
        True,
        yes_or_no,
        "find members on the local network by mDNS; others there see that a node is there, not whose it is",
    )
    swarm_key: str = setting(
        "",
        path,
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
    layers: int = setting(0, number(0, 1024), "most layers to hold; 0: as many as the memory takes")
    threads: int = setting(
        1, number(1, 256), "of one engine step; decoding is bound by memory bandwidth, and the network needs a core"
    )
    sessions: int = setting(8, number(1, 1024), "generations at once; more are refused with a retry time")
    kv_memory: Amount = setting(
        Amount(percent=25),
        parse_amount,
        "bytes, or share of serve.memory, for the KV of all sessions; the rest holds weights",
    )
    prefix_cache: bool = setting(
        True,
        yes_or_no,
        "keep the KV of prompts, for those of the same node that begin alike, until a session needs its memory",
    )
    upstream: str = setting(
        "",
        server_url,
        f"a server of your own that speaks OpenAI's dialect (Ollama, vLLM), like {UPSTREAM_EXAMPLE}; empty: none",
    )
    upstream_models: tuple[str, ...] = setting(
        (), model_names, "models of serve.upstream that the network may ask for by name; empty: none"
    )
    engine: str = setting(
        "onnx",
        one_of("onnx", "null"),
        "null computes deterministic nonsense without a model, for tests of the mesh itself",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSection:
    enabled: bool = setting(
        True, yes_or_no, "answer programs that speak to OpenAI, Anthropic or Ollama, on this machine alone by default"
    )
    listen: str = setting(
        HTTP_EXAMPLE,
        host_port,
        "where; when the port is taken, the next free one; any address but loopback needs keys (meshnode key add)",
    )
    require_keys: bool = setting(False, yes_or_no, "ask for a key on loopback, too")
    tls_cert: str = setting("", path, "file with the certificate and its chain (PEM), for https; empty: http")
    tls_key: str = setting("", path, "file with the certificate's private key (PEM)")
    cors: tuple[str, ...] = setting(
        (), origins, f"web pages of others that may ask, like {ORIGIN_EXAMPLE}; empty: none but the node's own"
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
        yes_or_no,
        "keep model files encrypted on the disk, with this node's key (a passphrase on it protects them, too); "
        "what is in use is in memory; takes effect at the next start",
    )
    replicas: int = setting(
        2,
        number(1, 64),
        "copies of every file of the served model that the mesh keeps, if it has so many nodes; 1: no extra ones",
    )
    ipfs_api: str = setting(
        "",
        rpc_address,
        f"the RPC of an IPFS daemon, like {IPFS_API_EXAMPLE}, asked for what no peer gives; empty: none",
    )
    ipfs_publish: bool = setting(
        False,
        yes_or_no,
        "also have the daemon of content.ipfs_api keep what this node holds of the served model, for all who ask it",
    )
    gateways: tuple[str, ...] = setting(
        (),
        gateway_urls,
        f"trustless gateways, like {GATEWAY_EXAMPLE}, asked for what no peer gives; they learn what this node "
        "fetches",
    )
    ipfs_peers: tuple[str, ...] = setting(
        (),
        multiaddrs("/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", PEER_EXAMPLE),
        "IPFS nodes outside this network that are asked for what no member gives; they can do nothing else here",
    )
    share: str = setting(
        "members",
        one_of("members", "guests", "anyone"),
        "who gets the files of this node; guests: the nodes of content.ipfs_peers, too; anyone: everybody who "
        "connects, as on IPFS",
    )
    dht: tuple[str, ...] = setting(
        (),
        multiaddrs("/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", PEER_EXAMPLE, lowest_port=1),
        "peers of a Kademlia DHT, like the one of IPFS, asked who has what nobody known gives; with content.share = "
        "anyone they are told what this node gives; empty: none; they learn what this node fetches",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnSection:
    enabled: bool = setting(
        False,
        yes_or_no,
        "train on this device's samples while it is idle, and give others what was learned; samples never leave it",
    )
    keep_answers: bool = setting(
        True,
        yes_or_no,
        "keep the last 256 answers with their questions on this device, so that `meshnode feedback` can judge them",
    )
    max_samples: int = setting(
        10_000, number(16, 1_000_000), "samples kept; the least useful of the largest classes go first, oldest first"
    )
    max_size: Amount = setting(
        Amount(size_bytes=100_000_000), parse_amount, "bytes, or share of the free disk, for all samples"
    )
    power: str = setting("mains", one_of("mains", "any"), "mains: train while it is plugged in; any: on battery, too")
    battery: int = setting(60, number(0, 100), "percent below which nothing is trained, with learn.power = any")
    load: int = setting(30, number(1, 100), "percent of all cores that other work may take while this node trains")
    owner_idle: int = setting(
        5, number(0, 1440), "minutes since somebody last typed, where that can be seen; 0: whoever works on it"
    )
    hours: str = setting("", hours, f"part of the day in which it trains, like {HOURS_EXAMPLE}; empty: all day")
    schedule: str = setting(
        "experience",
        one_of("experience", "interval"),
        "experience: when, how long and with whom by what it has brought so far; interval: every learn.interval",
    )
    interval: int = setting(30, number(1, 10_080), "minutes from one round to the next, and between looks otherwise")
    steps: int = setting(10, number(1, 1000), "training steps of an ordinary round, of 8 samples each")
    mode: str = setting(
        "pairwise",
        one_of("pairwise", "noloco", "elastic", "allreduce", "hierarchical", "broadcast"),
        "how nodes mix what they have learned; the same on all; broadcast is for slow links",
    )
    epsilon: float = setting(
        0.0,
        real(0, 1000),
        "most that differential privacy may let out about one sample, for good; 8 is common, less is safer and "
        "learns less; 0: no differential privacy",
    )
    delta: float = setting(
        1e-5, real(1e-12, 0.1), "chance that learn.epsilon does not hold; well below one by the number of samples"
    )
    privacy_steps: int = setting(
        1000,
        number(1, 10_000_000),
        "training steps that learn.epsilon is to last for: more steps, more noise in each",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerSection:
    battery: int = setting(
        30, number(0, 100), "percent below which, unplugged, background work stops and then serving; 0: never"
    )
    heat: int = setting(95, number(0, 120), "the same above so many degrees Celsius, where sensors tell; 0: never")
    idle: int = setting(
        0, number(0, 1440), "the same for so many minutes after somebody typed, where that can be seen; 0: never"
    )
    load: int = setting(
        0, number(0, 100), "the same while other programs take more than so many percent of all cores; 0: never"
    )
    hours: str = setting("", hours, f"the same outside this part of the day, like {HOURS_EXAMPLE}; empty: never")
    drain_after: int = setting(
        5, number(0, 1440), "minutes from the end of background work to that of serving; 0: serving goes on"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSection:
    upload: int = setting(
        0, rate, f"bytes a second of model files that others get from this node, like {RATE_EXAMPLE}; 0: no limit"
    )
    cores: int = setting(
        0,
        number(0, 1024),
        "most processor cores that the node and its engines use (Linux); 0: all; at the next start",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSection:
    enabled: bool = setting(
        False, yes_or_no, "note who asks this node for what kind of thing when: `meshnode audit show`, `verify`"
    )
    text: bool = setting(False, yes_or_no, "note what was asked as well")
    max_size: Amount = setting(
        Amount(size_bytes=10_000_000), parse_amount, "bytes of a file of it; then the next one begins"
    )
    files: int = setting(10, number(2, 1000), "of it that are kept; the oldest goes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSection:
    collect: int = setting(
        120, number(0, 86_400), "seconds in which votes on an adapter are collected before the first node uses it"
    )
    soak: int = setting(
        900,
        number(0, 604_800),
        "seconds from one step of a roll-out to the next: 5, 25, 50, 100 percent of the nodes; the same on all nodes",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    level: str = setting(
        "info", one_of("debug", "info", "warning", "error"), "info is about one line a minute when nothing happens"
    )
    format: str = setting("auto", one_of("auto", "console", "json"), "auto: console on a terminal, json elsewhere")
    file: str = setting("", text(4096), "path, relative to the data folder; empty: standard error")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSection:
    otlp: str = setting(
        "",
        url_or_none,
        f"OpenTelemetry collector (OTLP over HTTP), like {OTLP_EXAMPLE}, that gets a trace of every question, never "
        "its text; needs meshnode[otlp]; empty: none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The effective settings of one node and where each came from."""

    paths: Paths
    node: NodeSection = NodeSection()
    network: NetworkSection = NetworkSection()
    serve: ServeSection = ServeSection()
    http: HttpSection = HttpSection()
    content: ContentSection = ContentSection()
    learn: LearnSection = LearnSection()
    owner: OwnerSection = OwnerSection()
    limits: LimitsSection = LimitsSection()
    audit: AuditSection = AuditSection()
    release: ReleaseSection = ReleaseSection()
    log: LogSection = LogSection()
    trace: TraceSection = TraceSection()
    origins: Mapping[str, str] = field(default_factory=dict)  # "serve.memory" -> "the command line"; absent: default
