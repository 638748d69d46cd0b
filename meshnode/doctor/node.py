"""What a running node says about itself: each check takes its status (`meshnode status --json`) and gives findings.

Fields may be missing: the node may be of another version than the doctor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from meshnode.doctor.finding import Finding, Level, ok, one_line, warning, wrong

Status = Mapping[str, Any]

HOUR_MS: Final = 3_600_000
SLOW_MS: Final = 100.0  # a round trip that every token has to wait for
IS_MESHNODE: Final = "Is meshnode running there?"
IS_IPFS: Final = "Is the IPFS node running there? Have both nodes the same swarm key, or none?"
_REACHED: Final = re.compile(r"\S+ can't be reached: ")  # the reason may say it, too
_LEVELS: Final = {"high": Level.WRONG, "medium": Level.WARNING, "low": Level.OK}
_REFUSALS: Final = {
    "invite-expired": "Make a new ticket with `meshnode invite`.",
    "invite-used": "Make a new ticket with `meshnode invite`; --uses N lets in several devices.",
    "stranger": "If it is yours, let it in: `meshnode invite` here, `meshnode join TICKET` there.",
    "other-network": "It belongs to another network; if it is yours, join it with a data folder of its own.",
    "clock": "Set the clocks of both devices: timedatectl set-ntp true",
    "expired": "Its membership has ended; `meshnode invite` here, `meshnode join TICKET` there.",
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


def check_version(status: Status, installed: str) -> Finding:
    running = str(status.get("software", "?"))
    if running != installed:
        return warning(
            "version",
            f"The running node is meshnode {running}, installed is {installed}.",
            "Restart it: meshnode stop, then meshnode start.",
        )
    return ok("version", f"meshnode {installed}")


def check_readiness(status: Status) -> Finding:
    why = str(status.get("readiness", "it does not say why"))
    if status.get("ready"):
        return ok("ready", why)
    return warning(
        "ready",
        f"The mesh can't answer yet: {why}.",
        "It is tried again by itself; `meshnode status` shows what happens.",
    )


def check_health(status: Status) -> list[Finding]:
    """One finding per warning that the node shows; its sentences say themselves what to do."""
    found = [
        Finding(
            f"health {one_line(str(w.get('code', '?')))}",
            _LEVELS.get(w.get("severity"), Level.WARNING),
            one_line(str(w.get("text", ""))),
        )
        for w in status.get("health", ())
    ]
    return found or [ok("health", "the node complains of nothing")]


def check_unreachable(status: Status) -> list[Finding]:
    guests = (status.get("content") or {}).get("guests") or {}
    return [
        warning(
            "peer",
            f"{who} can't be reached: {_REACHED.sub('', str(why), count=1).rstrip('.')}.",
            f"{IS_IPFS if who in guests else IS_MESHNODE} Do a firewall or router let its TCP port through?",
        )
        for who, why in sorted(status.get("unreachable", {}).items())
    ] or [ok("peers", "every known peer is connected")]


def check_refusals(status: Status, now_ms: int) -> list[Finding]:
    """Those of the last hour."""
    return [
        warning(
            "refused",
            f"{r.get('text', '?')}" + ("" if r.get("by_us", True) else f" (said {r.get('peer', 'a peer')} about us)"),
            _REFUSALS.get(str(r.get("code")), "If that device is yours, run `meshnode doctor` on it."),
        )
        for r in status.get("refusals", ())
        if now_ms - r.get("at_ms", 0) < HOUR_MS
    ] or [ok("refusals", "nobody was refused within the last hour")]


def check_links(status: Status) -> list[Finding]:
    found = []
    connected = [peer for peer in status.get("peers", ()) if peer.get("connected")]
    for peer in connected:
        trip = peer.get("round_trip_ms")
        if trip is not None and trip > SLOW_MS:
            found.append(
                warning(
                    "link",
                    f"A round trip to {peer.get('name') or peer.get('peer')} takes {trip:.0f} ms; every token that "
                    "passes there waits for it.",
                    "Connect both devices by cable, or to the same access point.",
                )
            )
    count = f"{len(connected)} peer{'' if len(connected) == 1 else 's'}"
    return found or [ok("links", f"{count} connected, none of them slow")]
