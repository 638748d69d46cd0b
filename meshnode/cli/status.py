"""`meshnode status`: one line per peer in words, health with remedies."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from meshnode import client
from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of

COUNTED_AFTER_S: Final = 10.0  # a node that has just started does not know yet what the others hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="the same facts as JSON (fields may be added)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when the mesh answers, 9 when it is not ready."""
    status = client.ask_one(folder_of(arguments), {"do": "status"})
    print(json.dumps(status, indent=2) if arguments.json else words(status))
    return 0 if status["ready"] else 9


def words(status: dict[str, Any]) -> str:
    """The screen."""
    model = status["model"]
    lines = [
        f"network {status['network']}   "
        + (
            f"model {model['name']} {model['version']} {model['variant']}, {model['layers']} layers"
            if model
            else "no model yet"
        ),
        ("ready: " if status["ready"] else "not ready: ") + status["readiness"],
    ]
    if status["prediction"]:
        lines.append(f"predicted: {status['prediction']}")
    lines.append("")
    rows = [("you", status["me"]), *(("peer", peer) for peer in status["peers"])]
    lines += [_line(kind, row) for kind, row in rows]
    if status["progress"]:
        p, span = status["progress"], status["progress"]["span"]
        share, total = 100 * p["bytes_done"] // max(1, p["bytes_total"]), _mb(p["bytes_total"])
        lines.append(f"\n{p['phase']} layers {span['first']}-{span['last'] - 1}: {share} % of {total}")
    if status["copies"]:
        lines += ["", _copies(status), _tiers(status["content"])]
    if guests := status["content"].get("guests"):
        lines += [] if status["copies"] else [""]
        lines.append(f"ipfs: {sum(guests.values())} of {len(guests)} peers connected")
    if status["health"]:
        lines.append("\n# Health")
        lines += [f"#  - {w['text']}" for w in status["health"]]
    return "\n".join(_shown(line) for line in lines)


def _copies(status: dict[str, Any]) -> str:
    """How many copies of the model the mesh has."""
    copies = status["copies"]
    members = 1 + sum(peer["state"] != "draining" for peer in status["peers"])
    early = status["uptime_s"] < COUNTED_AFTER_S and (copies["short"] or copies["nodes"] == 1)
    if early or copies["nodes"] < members:
        return "copies: being counted"
    if copies["nodes"] == 1:
        return "copies: this node alone holds the model; a second node would keep a copy of every file"
    if not copies["short"]:
        return f"copies: {copies['fewest']} or more of every file"
    thin = [name for name, count in copies["groups"].items() if count < copies["wanted"]]
    groups = f": {', '.join(thin[:4])}{' and others' if len(thin) > 4 else ''}" if thin else ""
    going = "; copies are being made" if copies.get("planned") else ""
    return (
        f"copies: {copies['short']} of {copies['files']} files have too few (the fewest {copies['fewest']}, "
        f"wanted {copies['wanted']}){groups}{going}"
    )


def _tiers(content: dict[str, Any]) -> str:
    hot, warm, cold = (_mb(content[f"{kind}_bytes"]) for kind in ("hot", "warm", "cold"))
    covered = ", encrypted on the disk" if content.get("encrypted") else ""
    return f"files: {hot} in use (hot), {warm} more on this disk (warm), {cold} elsewhere (cold){covered}"


def _line(kind: str, row: dict[str, Any]) -> str:
    where = "" if kind == "you" else _where(row)
    return f"{kind:<5}{_short(row['peer'])}  {row['name'][:20]:<20}  {_does(row):<34}{where}".rstrip()


def _does(row: dict[str, Any]) -> str:
    layers = "" if row["first"] is None else f"layers {row['first']}-{row['last'] - 1}"
    target = "" if row["target"] is None else f"layers {row['target'][0]}-{row['target'][1] - 1}"
    count = row["sessions"]
    sessions = f", {count} session{'s' if count > 1 else ''}" if count else ""
    state = row["state"]
    if state == "serving":
        return f"serving {layers}{sessions}"
    if state == "draining":
        return f"leaving, still serving {layers}{sessions}"
    if state in ("intent", "loading"):
        going = "is going to serve" if state == "intent" else "loading"
        return f"{going} {target}" + (f", serving {layers}" if layers else "")
    return "serves no layers" if row["memory_bytes"] else "meeting point, serves no layers"


def _where(row: dict[str, Any]) -> str:
    if not row["connected"]:
        return f"not connected, last heard of {row['age_s']:.0f} s ago"
    return "connected" if row["round_trip_ms"] is None else f"direct {row['round_trip_ms']:.1f} ms"


def _short(peer: str) -> str:
    return f"{peer[:4]}…{peer[-4:]}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _shown(text: str) -> str:
    """Texts of peers may hold anything; a terminal sees printable characters only."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
