"""What the owner of a node can set: each setting on one line with its default, how it is read and why it is so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshnode.config.values import (
    GATEWAY_EXAMPLE,
    IPFS_API_EXAMPLE,
    LISTEN_EXAMPLE,
    NAME_EXAMPLE,
    PEER_EXAMPLE,
    Amount,
    gateway_urls,
    multiaddrs,
    number,
    one_of,
    parse_amount,
    path,
    rpc_address,
    setting,
    text,
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
    engine: str = setting(
        "onnx",
        one_of("onnx", "null"),
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
class LogSection:
    level: str = setting(
        "info", one_of("debug", "info", "warning", "error"), "info is about one line a minute when nothing happens"
    )
    format: str = setting("auto", one_of("auto", "console", "json"), "auto: console on a terminal, json elsewhere")
    file: str = setting("", text(4096), "path, relative to the data folder; empty: standard error")


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
