"""`meshnode status`: one line per peer in words, health with remedies."""

from __future__ import annotations

import argparse
import json
from typing import Final

from meshnode.api.messages import ContentStatus, CopiesStatus, PeerStatus, Status
from meshnode.cli.learn import learning_line
from meshnode.cli.main import add_data
from meshnode.cli.release import line
from meshnode.cli.settings import client_of
from meshnode.core.printable import printable
from meshnode.core.sizes import counted, format_size

COUNTED_AFTER_S: Final = 10.0  # a node that has just started does not know yet what the others hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="the same facts as JSON (fields may be added)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when the mesh answers, 9 when it is not ready."""
    status = client_of(arguments).status()
    print(json.dumps(status.as_json(), indent=2) if arguments.json else describe(status))
    return 0 if status.ready else 9


def describe(status: Status) -> str:
    """The status for people, in lines."""
    model = status.model
    served = (
        f"model {model.name} {model.version} {model.variant}, {counted(model.layers, 'layer')}"
        if model
        else "no model"
    )
    lines = [
        f"network {status.network}   {served}",
        ("ready: " if status.ready else "not ready: ") + status.readiness,
    ]
    if status.api_url:
        lines.append(f"programs ask at {status.api_url}/v1 (OpenAI), {status.api_url} (Anthropic, Ollama)")
    if status.duty.why:
        lines.append(f"this node is {status.duty.duty}, because {status.duty.why}")
    if status.prediction:
        lines.append(f"predicted: {status.prediction}")
    lines += ["", _line("you", status.me), *(_line("peer", peer) for peer in status.peers)]
    if progress := status.progress:
        share, total = 100 * progress.bytes_done // max(1, progress.bytes_total), format_size(progress.bytes_total)
        lines.append(f"\n{progress.phase} {_layers(progress.span.first, progress.span.last)}: {share} % of {total}")
    lines += [
        f"adapter {line(one)}" for one in status.releases if one.in_use or one.phase in ("open", "rolling", "held")
    ]
    names = {peer.peer: peer.name for peer in (status.me, *status.peers)}
    lines += [
        f"upstream {model}: asked by name, by a server of {', '.join(names.get(p) or _short(p) for p in peers)}"
        for model, peers in status.upstream.items()
    ]
    if status.copies:
        lines += ["", _copies(status, status.copies), _tiers(status.content)]
    if status.learning.lesson:
        lines.append(f"learning: {learning_line(status.learning)}")
    if status.samples.labelled:
        kept = status.samples
        lines.append(f"samples: {kept.labelled} to learn from, {kept.fresh} of them new")
    if guests := status.content.guests:
        lines += [] if status.copies else [""]
        lines.append(f"ipfs: {sum(guests.values())} of {len(guests)} peers connected")
    troubles = [
        f"#  - {peer.name or _short(peer.peer)} says: {peer.trouble}" for peer in status.peers if peer.trouble
    ]
    if status.health or troubles:
        lines.append("\n# Health")
        lines += [*(f"#  - {warning.text}" for warning in status.health), *troubles]
    return printable("\n".join(lines), keep="\n")


def _copies(status: Status, copies: CopiesStatus) -> str:
    """How many copies of the model the mesh has."""
    members = 1 + sum(peer.state != "draining" for peer in status.peers)
    early = status.uptime_s < COUNTED_AFTER_S and (copies.short or copies.nodes == 1)
    if early or copies.nodes < members:
        return "copies: being counted"
    if copies.nodes == 1:
        return "copies: this node alone holds the model; a second node would keep a copy of every file"
    if not copies.short:
        return f"copies: {copies.fewest} or more of every file"
    thin = [name for name, count in copies.groups.items() if count < copies.wanted]
    groups = f": {', '.join(thin[:4])}{' and others' if len(thin) > 4 else ''}" if thin else ""
    going = "; copies are being made" if copies.planned else ""
    return (
        f"copies: {copies.short} of {copies.files} files have too few (the fewest {copies.fewest}, "
        f"wanted {copies.wanted}){groups}{going}"
    )


def _tiers(content: ContentStatus) -> str:
    hot, warm, cold = (format_size(size) for size in (content.hot_bytes, content.warm_bytes, content.cold_bytes))
    covered = ", encrypted on the disk" if content.encrypted else ""
    return f"files: {hot} in use (hot), {warm} more on this disk (warm), {cold} elsewhere (cold){covered}"


def _line(kind: str, row: PeerStatus) -> str:
    reached = "" if kind == "you" else where(row)
    doing = does(row) if row.duty == "full" else f"{does(row)}, {row.duty}"
    return f"{kind:<5}{_short(row.peer)}  {row.name[:20]:<20}  {doing:<34}{reached}".rstrip()


def does(row: PeerStatus) -> str:
    """What a node does."""
    layers = "" if row.first is None or row.last is None else _layers(row.first, row.last)
    target = "" if row.target is None else _layers(*row.target)
    sessions = f", {counted(row.sessions, 'session')}" if row.sessions else ""
    match row.state:
        case "serving":
            return f"serving {layers}{sessions}"
        case "draining":
            going = "giving away" if row.duty == "drained" else "leaving, still serving"
            return f"{going} {layers}{sessions}"
        case "intent" | "loading":
            going = "is going to serve" if row.state == "intent" else "loading"
            return f"{going} {target}" + (f", serving {layers}" if layers else "")
        case _:
            point = not row.memory_bytes and row.duty != "drained"
            return "meeting point, serves no layers" if point else "serves no layers"


def where(row: PeerStatus) -> str:
    """How it is reached from here."""
    if not row.connected:
        return f"not connected, last heard of {row.age_s or 0:.0f} s ago"
    return "connected" if row.round_trip_ms is None else f"direct {row.round_trip_ms:.1f} ms"


def _layers(first: int, last: int) -> str:
    return f"layers {first}-{last - 1}"


def _short(peer: str) -> str:
    return f"{peer[:4]}…{peer[-4:]}"
