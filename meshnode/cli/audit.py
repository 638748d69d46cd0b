"""`meshnode audit`: who asked this node for what kind of thing when, and whether that record is as it was written."""

from __future__ import annotations

import argparse
import json
from collections import deque
from datetime import datetime
from pathlib import Path

from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of
from meshnode.core.errors import ConfigError, DiskError
from meshnode.core.paths import Paths
from meshnode.core.printable import printable
from meshnode.core.reasons import cause
from meshnode.core.sizes import counted
from meshnode.state.audit import entries_of, verify_log
from meshnode.state.audit_chain import Entry
from meshnode.state.database import Database
from protocols.errors import RemoteProtocolError

NONE_YET = "Nothing was noted yet. Nodes note what they are asked for when audit.enabled is true (in config.toml)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="whether a line was changed, taken out, put in or moved")
    show = actions.add_parser("show", help="the last lines")
    show.add_argument("--last", type=int, default=50, metavar="N", help="how many (default: 50)")
    for action in (verify, show):
        add_data(action)
        action.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0, or 1 when something is wrong with the log."""
    folder = folder_of(arguments)
    try:
        return _verify(arguments, folder) if arguments.action == "verify" else _show(arguments, folder)
    except OSError as error:
        raise DiskError(f"The audit log in {folder} can't be read: {cause(error)}.") from error


def _verify(arguments: argparse.Namespace, folder: Path) -> int:
    path = Paths(folder).state
    if not path.exists():
        raise ConfigError(f"{folder} is no data folder of a node; `meshnode init` or `join` makes one")
    with Database(path) as state:
        try:
            found = verify_log(folder, state)
        except RemoteProtocolError as error:
            raise DiskError(f"Where the audit log ends can't be read from {path}: {error}.") from error
    if arguments.json:
        print(json.dumps({"lines": found.lines, "problems": list(found.problems)}))
    elif not found.problems:
        print(f"{counted(found.lines, 'line')}, all as they were written." if found.lines else NONE_YET)
    for problem in () if arguments.json else found.problems:
        print(printable(f"{problem}."))
    return 1 if found.problems else 0


def _show(arguments: argparse.Namespace, folder: Path) -> int:
    if not 1 <= arguments.last <= 1_000_000:
        raise ConfigError(f"--last {arguments.last}: it takes 1 to 1000000")
    last = deque(entries_of(folder), arguments.last)
    if arguments.json:
        print(json.dumps([{"n": entry.link.n, **entry.fields} for entry in last]))
        return 0
    for entry in last:
        print(printable(_line(entry)))
    if not last:
        print(NONE_YET)
    return 0


def _line(entry: Entry) -> str:
    fields = entry.fields
    when = datetime.fromtimestamp(fields.get("at", 0) / 1000).astimezone().isoformat(" ", "seconds")
    text = f"  {fields['text']}" if "text" in fields else ""
    missed = fields.get("refusals_not_noted")
    more = f"  ({missed} refusals before it were not noted)" if missed else ""
    asked = f"{fields.get('via', ''):<6}  {fields.get('who', '')}  {fields.get('what', '')}"
    return f"{entry.link.n:>6}  {when}  {asked}{text}{more}"
