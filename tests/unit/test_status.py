"""The words of `meshnode status` about copies, files and IPFS, from the facts that a node gives."""

from __future__ import annotations

from typing import Any

import pytest

from meshnode.cli.status import words


def row(name: str, **facts: Any) -> dict[str, Any]:
    return {
        "peer": f"12D3KooW{name}",
        "name": name,
        "first": None,
        "last": None,
        "target": None,
        "sessions": 0,
        "state": "idle",
        "memory_bytes": 1,
        "connected": True,
        "round_trip_ms": 1.0,
        **facts,
    }


def status(
    *,
    peers: int = 1,
    state: str = "idle",
    uptime_s: float = 60.0,
    content: dict[str, Any] | None = None,
    **copies: Any,
) -> dict[str, Any]:
    return {
        "network": "home",
        "model": {"name": "tiny", "version": "v1.0.0-0", "variant": "int4", "layers": 4},
        "ready": True,
        "readiness": "a probe came back",
        "prediction": "",
        "me": row("me"),
        "peers": [row(f"peer{number}", state=state) for number in range(peers)],
        "progress": None,
        "uptime_s": uptime_s,
        "copies": {"wanted": 2, "nodes": 1 + peers, "fewest": 2, "files": 8, "short": 0, "groups": {}, **copies},
        "content": {"hot_bytes": 0, "warm_bytes": 0, "cold_bytes": 0, **(content or {})},
        "health": [],
    }


ALONE = "copies: this node alone holds the model"
COUNTED = "copies: being counted"
SHORT = {"fewest": 1, "short": 2, "groups": {"layer.1": 2, "layer.2": 1, "graph": 1}}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (status(), "copies: 2 or more of every file"),
        (status(uptime_s=1), "copies: 2 or more of every file"),
        (status(peers=0, fewest=1, wanted=1), ALONE),
        (status(peers=0, fewest=1, wanted=1, uptime_s=3), COUNTED),
        (status(peers=1, nodes=1, fewest=1, wanted=1), COUNTED),
        (status(peers=1, nodes=1, fewest=1, wanted=1, state="draining"), ALONE),
        (status(**SHORT, uptime_s=3), COUNTED),
        (
            status(**SHORT),
            "copies: 2 of 8 files have too few (the fewest 1, wanted 2): layer.2, graph",
        ),
        (
            status(**SHORT, planned=2),
            "copies: 2 of 8 files have too few (the fewest 1, wanted 2): layer.2, graph; copies are being made",
        ),
    ],
)
def test_copies(facts: dict[str, Any], said: str) -> None:
    (line,) = [line for line in words(facts).splitlines() if line.startswith("copies:")]
    assert line.startswith(said)
    assert ("being made" in line) == ("being made" in said)


def test_encryption_is_told() -> None:
    assert "0.0 MB elsewhere (cold), encrypted on the disk" in words(status(content={"encrypted": True}))
    assert "encrypted" not in words(status(content={"encrypted": False}))


def test_ipfs_peers_are_counted_if_there_are_any() -> None:
    guests = {"12D3KooWa": True, "12D3KooWb": False, "12D3KooWc": True}
    assert "ipfs: 2 of 3 peers connected" in words(status(content={"guests": guests}))
    assert "ipfs:" not in words(status(content={"guests": {}}))
