"""The words of `meshnode status` about copies, files and IPFS, from the facts that a node gives."""

from __future__ import annotations

from typing import Any

import pytest

from meshnode.api.messages import ContentStatus, CopiesStatus, PeerStatus, Status
from meshnode.cli.status import describe


def status(
    *,
    peers: int = 1,
    state: str = "idle",
    uptime_s: float = 60.0,
    content: ContentStatus = ContentStatus(),
    **copies: Any,
) -> Status:
    return Status(
        peers=tuple(PeerStatus(name=f"peer{number}", state=state) for number in range(peers)),
        uptime_s=uptime_s,
        copies=CopiesStatus(**{"wanted": 2, "nodes": 1 + peers, "fewest": 2, "files": 8, **copies}),
        content=content,
    )


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
def test_copies(facts: Status, said: str) -> None:
    (line,) = [line for line in describe(facts).splitlines() if line.startswith("copies:")]
    assert line.startswith(said)
    assert ("being made" in line) == ("being made" in said)


def test_encryption_is_told() -> None:
    assert "0 B elsewhere (cold), encrypted on the disk" in describe(status(content=ContentStatus(encrypted=True)))
    assert "encrypted" not in describe(status())


def test_ipfs_peers_are_counted_if_there_are_any() -> None:
    guests = {"12D3KooWa": True, "12D3KooWb": False, "12D3KooWc": True}
    assert "ipfs: 2 of 3 peers connected" in describe(status(content=ContentStatus(guests=guests)))
    assert "ipfs:" not in describe(status())
