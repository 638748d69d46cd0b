"""What a running node says about itself: each check takes its status and gives findings.

The node may be of another version than the doctor; what its status lacks has a default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from meshnode.api.messages import Status
from meshnode.core.printable import one_line
from meshnode.core.sizes import counted
from meshnode.doctor.finding import Finding, Level, ok, warning, wrong

HOUR_MS: Final = 3_600_000
SLOW_MS: Final = 100.0  # a round trip that every token has to wait for
LET_THROUGH: Final = "Does a firewall or a router let its TCP port through?"
IS_MESHNODE: Final = "Is meshnode running there?"
IS_IPFS: Final = "Is the IPFS node running there? Do both nodes have the same swarm key, or none?"
_REACHED: Final = re.compile(r"\S+ can't be reached: ")  # the reason may say it, too
_LEVELS: Final = {"high": Level.WRONG, "medium": Level.WARNING, "low": Level.OK}
_REFUSALS: Final = {
    "invite-expired": "Make a new ticket with `meshnode invite`.",
    "invite-used": "Make a new ticket with `meshnode invite`; --uses N lets in several devices.",
    "stranger": "If it is yours, let it in: `meshnode invite` here, `meshnode join TICKET --anew` there.",
    "other-network": "It belongs to another network; if it is yours, join it with a data folder of its own.",
    "clock": "Set the clocks of both devices: timedatectl set-ntp true",
    "expired": "Its membership has ended; `meshnode invite` here, `meshnode join TICKET --anew` there.",
}
_WE_WERE: Final = {  # refused
    "clock": "Set the clocks of both devices: timedatectl set-ntp true",
    "other-network": "It belongs to another network; to enter that one, join with a data folder of its own.",
}


def check_control(
    folder: str, *, running: bool, took_ms: float = 0.0, problem: str = "", pid: int | None = None
) -> Finding:
    """`pid`: the process that holds the data folder's lock, where the system tells."""
    if problem:
        return wrong(
            "node",
            f"The running node gives no status: {problem}",
            f"It hangs or is overloaded. End it ({f'kill -9 {pid}' if pid else 'kill -9'}) and start it again.",
        )
    if not running:
        return ok("node", f"none is running; start it with: meshnode start --data {folder}")
    return ok("node", f"running, answered in {took_ms:.0f} ms")


def check_status(status: Status, installed: str, now_ms: int) -> Iterator[Finding]:
    """All that follows. `installed`: the version of this program."""
    yield check_version(status, installed)
    yield from check_unreachable(status)
    yield from check_links(status)
    yield from check_refusals(status, now_ms)
    yield check_readiness(status)
    yield from check_health(status)


def check_version(status: Status, installed: str) -> Finding:
    running = status.software or "?"
    if running != installed:
        return warning(
            "version",
            f"The running node is meshnode {running}, installed is {installed}.",
            "Restart it: meshnode stop, then meshnode start.",
        )
    return ok("version", f"meshnode {installed}")


def check_readiness(status: Status) -> Finding:
    why = status.readiness or "it does not say why"
    if status.ready:
        return ok("ready", why)
    return warning(
        "ready",
        f"The mesh can't answer yet: {why}.",
        "The node keeps trying; `meshnode status` shows what happens.",
    )


def check_health(status: Status) -> list[Finding]:
    """One finding per warning that the node shows; its sentences say themselves what to do."""
    found = [
        Finding("health", _LEVELS.get(w.severity, Level.WARNING), one_line(w.text), code=one_line(w.code))
        for w in status.health
    ]
    return found or [ok("health", "the node complains of nothing")]


def check_unreachable(status: Status) -> list[Finding]:
    return [
        warning(
            "peer",
            f"{who} can't be reached: {_REACHED.sub('', why, count=1).rstrip('.')}.",
            f"{IS_IPFS if who in status.content.guests else IS_MESHNODE} {LET_THROUGH}",
        )
        for who, why in sorted(status.unreachable.items())
    ] or [ok("peers", "every known peer is connected")]


def check_refusals(status: Status, now_ms: int) -> list[Finding]:
    """Those of the last hour."""
    return [
        warning(
            "refused",
            r.text if r.by_us else f"{r.text} (said {r.peer} about us)",
            _REFUSALS.get(r.code, "If that device is yours, run `meshnode doctor` on it.")
            if r.by_us
            else _WE_WERE.get(
                r.code, "Get a ticket (`meshnode invite` there) and run `meshnode join TICKET --anew` here."
            ),
        )
        for r in status.refusals
        if now_ms - r.at_ms < HOUR_MS
    ] or [ok("refusals", "nobody was refused within the last hour")]


def check_links(status: Status) -> list[Finding]:
    connected = [peer for peer in status.peers if peer.connected]
    count = counted(len(connected), "peer")
    return [
        warning(
            "link",
            f"A round trip to {peer.name or peer.peer} takes {peer.round_trip_ms:.0f} ms; every token that passes "
            "there waits for it.",
            "Connect both devices by cable, or to the same access point.",
        )
        for peer in connected
        if peer.round_trip_ms is not None and peer.round_trip_ms > SLOW_MS
    ] or [ok("links", f"{count} connected, none of them slow")]
