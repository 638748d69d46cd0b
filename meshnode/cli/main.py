"""The command line: one tree of commands, each in a file of its own, imported only when it is used."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from meshnode import __version__
from meshnode.core.errors import EXIT_CODES, Declined
from meshnode.core.paths import data_folder
from meshnode.core.printable import printable
from protocols.errors import MeshError

# name, module, one line. Each module has `add_arguments(parser)` and `run(arguments) -> int`.
COMMANDS: Final = (
    ("init", "meshnode.cli.init", "make a new private network and print a ticket for the next device"),
    ("join", "meshnode.cli.join", "enter a network with a ticket"),
    ("invite", "meshnode.cli.invite", "print another ticket; list tickets, make one worthless"),
    ("pair", "meshnode.cli.pair", "let a device in, or enter a network, by a PIN instead of a ticket"),
    ("members", "meshnode.cli.members", "who belongs to the network; put somebody out"),
    ("start", "meshnode.cli.start", "run this node"),
    ("bootstrap", "meshnode.cli.bootstrap", "run this node as a meeting point that serves no layers"),
    ("service", "meshnode.cli.service", "have the system run this node whenever you are logged in"),
    ("stop", "meshnode.cli.stop", "hand over the layers, then stop the node"),
    ("pause", "meshnode.cli.pause", "no background work on this device, for a while or until resume"),
    ("drain", "meshnode.cli.drain", "the same, and give the layers to other nodes; the node stays"),
    ("resume", "meshnode.cli.resume", "undo pause and drain"),
    ("status", "meshnode.cli.status", "what the mesh does now, one line per peer"),
    ("top", "meshnode.cli.top", "the mesh as it changes, on a screen of its own"),
    ("doctor", "meshnode.cli.doctor", "find out what is wrong on this device, with remedies"),
    ("generate", "meshnode.cli.generate", "continue or answer one prompt"),
    ("chat", "meshnode.cli.chat", "talk to the model"),
    ("feedback", "meshnode.cli.feedback", "say whether an answer was right, so that the mesh can learn from it"),
    ("data", "meshnode.cli.data", "the samples that this device keeps to learn from"),
    ("learn", "meshnode.cli.learn", "have the network learn from what its devices keep, and see how it goes"),
    ("model", "meshnode.cli.model", "add, list, show, verify and remove models"),
    ("key", "meshnode.cli.key", "keys by which programs may ask this node over HTTP"),
    ("audit", "meshnode.cli.audit", "who asked this node for what kind of thing when, and whether that was changed"),
    ("release", "meshnode.cli.release", "adapters that were learned: what is served, propose one, go back from one"),
    ("demo", "meshnode.cli.demo", "a bootstrap peer and three nodes on this machine answer a question together"),
    ("harness", "meshnode.cli.harness", "a whole mesh on this machine, to try things out and to test"),
    ("bench", "meshnode.cli.bench", "how fast the mesh is on this machine"),
    ("config", "meshnode.cli.config", "print the effective settings and where they come from"),
    ("completion", "meshnode.cli.completion", "what bash, zsh or fish needs to complete commands and flags"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one sentence on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(words)
    chosen = parser.parse_args(words)
    if chosen.command is None:
        parser.print_help()
        return 2
    if arguments is None:
        signal.signal(signal.SIGTERM, _end)  # `with` blocks clean up; a node has a handler of its own
    try:
        chosen.folder = data_folder(getattr(chosen, "data", None), os.environ)
        return int(chosen.run(chosen))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); say nothing more, not even at the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseExceptionGroup as group:
        found = _known(group)
        if found is None:
            raise
        return _say(found)
    except MeshError as error:
        return _say(error)


def _end(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Only the command that is named is imported: `status` must answer at once."""
    parser = argparse.ArgumentParser(
        prog="meshnode",
        description="One private AI machine out of the devices you have.",
        epilog="exit codes:\n" + "\n".join(f"  {code:<19} {meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meshnode {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    named = next((word for word in words if not word.startswith("-")), None)
    near = difflib.get_close_matches(named or "", [name for name, _, _ in COMMANDS], n=1)
    if near and near[0] != named:
        parser.error(f"there is no command {named!r}; did you mean {near[0]}?")
    for name, module, line in COMMANDS:
        sub = commands.add_parser(name, help=line, description=line)
        if name == named:
            loaded = importlib.import_module(module)
            loaded.add_arguments(sub)
            sub.set_defaults(run=loaded.run)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """The flag that every command about a node has."""
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="data folder of the node (default: $MESHNODE_DATA or your home)"
    )


def _known(group: BaseExceptionGroup[BaseException]) -> MeshError | None:
    """The one error of ours in a group, if everything in it is ours or a cancellation by the user."""
    ours: list[MeshError] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            inner = _known(error)
            if inner is None:
                return None
            ours.append(inner)
        elif isinstance(error, MeshError):
            ours.append(error)
        else:
            return None
    return ours[0] if ours else None


def _say(error: MeshError) -> int:
    print(f"meshnode: {printable(str(error), keep=chr(10))}", file=sys.stderr)
    code = int(getattr(error, "exit_code", 1))
    if code == 9 and isinstance(error, Declined):
        print("`meshnode status` says what to do.", file=sys.stderr)
    return code
