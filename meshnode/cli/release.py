"""`meshnode release`: which adapters are served and why, proposing one, going back from one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from meshnode.api.messages import ReleaseStatus
from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of
from meshnode.core.errors import ConfigError
from meshnode.core.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="as JSON (fields may be added)")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="every adapter that is proposed, rolled out, released or revoked (the default)")
    show = actions.add_parser("show", help="one of them, with its votes")
    show.add_argument("release", nargs="?", default="", metavar="RELEASE", help="version or CID (default: in use)")
    propose = actions.add_parser("propose", help="have members judge an adapter; it is served if it is better")
    propose.add_argument("adapter", metavar="CID", help="of the manifest of the adapter")
    back = actions.add_parser("rollback", help="go back from an adapter, for good")
    back.add_argument("release", nargs="?", default="", metavar="RELEASE", help="version or CID (default: in use)")
    back.add_argument("--reason", default="", help="for people, 100 characters at most")
    for action in actions.choices.values():  # before the action and behind it
        action.add_argument("--data", type=Path, metavar="FOLDER", default=argparse.SUPPRESS, help="of the node")
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    node = client_of(arguments)
    if arguments.action in (None, "list"):
        releases = node.releases()
        if arguments.json:
            print(json.dumps([dataclasses.asdict(one) for one in releases], indent=2))
        else:
            print(printable(listed(releases), keep="\n"))
        return 0
    if arguments.action == "show":
        shown = found(node.releases(), arguments.release)
    elif arguments.action == "propose":
        shown = node.propose(arguments.adapter)
    else:
        back = node.roll_back(arguments.release, why=arguments.reason)
        print(json.dumps(dataclasses.asdict(back), indent=2) if arguments.json else printable(back.effect))
        return 0
    text = json.dumps(dataclasses.asdict(shown), indent=2) if arguments.json else described(shown)
    print(printable(text, keep="\n"))
    return 0


def found(releases: tuple[ReleaseStatus, ...], wanted: str) -> ReleaseStatus:
    """The release with this version or CID; empty: the one in use. Raises ConfigError, with what there is."""
    if not wanted:
        chosen = [one for one in releases if one.in_use]
        if not chosen:
            raise ConfigError("No adapter is in use, so the model alone answers. `meshnode release list` shows all.")
    else:
        chosen = [one for one in releases if wanted in (one.version, one.adapter, one.candidate)]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        cids = ", ".join(one.adapter for one in chosen)
        raise ConfigError(f"Several releases are called {wanted}; name one by its CID: {cids}.")
    names = ", ".join(one.version for one in releases) or "none"
    raise ConfigError(f"There is no release {wanted!r} here; there are: {names}.")


def listed(releases: tuple[ReleaseStatus, ...]) -> str:
    """One line each."""
    if not releases:
        return "No adapter has been proposed yet, so the model alone answers."
    return "\n".join(line(one) for one in releases)


def line(one: ReleaseStatus) -> str:
    """Version, phase and why."""
    used = " (in use)" if one.in_use else ""
    return f"{one.version:<12}{phase(one):<16}{one.why}{used}"


def phase(one: ReleaseStatus) -> str:
    """Its phase, and for how many nodes."""
    return f"{one.phase} {one.share_percent:g} %" if one.phase in ("rolling", "held") else one.phase


def described(one: ReleaseStatus) -> str:
    """All of it, in lines."""
    lines = [
        f"{one.version}: {phase(one)}; {one.why}" + (" (in use)" if one.in_use else ""),
        f"adapter   {one.adapter}",
        f"replaces  {one.previous or 'the model alone'}",
        f"model     {one.base}",
        f"votes     {one.votes} of {one.voters} voters, {one.in_favour} in favour"
        + (f", median change in loss {one.median:+.4f}" if one.median is not None else ""),
        f"suite     {one.suite}",
        f"here      {one.right} answers with it were right, {one.wrong} wrong",
    ]
    if one.proposers:
        lines.append(f"proposed  by {', '.join(one.proposers)}")
    if one.parents:
        lines.append(f"learned   in round {one.round} from {len(one.parents)} deltas")
    return "\n".join(lines)
