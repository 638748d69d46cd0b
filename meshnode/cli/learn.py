"""`meshnode learn`: have the network learn from what its devices keep, and see how it goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from meshnode.api.messages import LearningStatus
from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of
from meshnode.core.printable import printable
from meshnode.core.sizes import format_size

WIDTH = 48  # characters of the curve
_BARS = "▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    start = actions.add_parser("start", help="give the network a lesson, judged on samples that are held out")
    add_data(start)
    start.add_argument(
        "--suite",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines {"input": ..., "label": ...} that nobody trains on; every node that learns fetches them',
    )
    start.add_argument("--model", default=None, metavar="NAME", help="default: the one that is served")
    add_lesson(start)
    start.add_argument("--json", action="store_true", help="what the lesson says, as JSON")
    for name, text in (
        ("stop", "take back the lesson that this node has given; what was learned stays"),
        ("status", "how learning goes on this node"),
    ):
        action = actions.add_parser(name, help=text)
        add_data(action)
        if name == "status":
            action.add_argument("--json", action="store_true", help="as JSON (fields may be added)")


def add_lesson(parser: argparse.ArgumentParser) -> None:
    """The flags that say how it is learned. None where the node's default holds."""
    rounds = parser.add_argument_group("rounds")
    rounds.add_argument("--rounds", type=int, metavar="N", help="default 12")
    rounds.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of training in one round (default 5); 0: each device chooses when it trains, and how long",
    )
    rounds.add_argument("--batch", type=int, metavar="N", help="samples of one step (default 8)")
    rounds.add_argument("--rate", "--lr", type=float, metavar="X", help="highest learning rate (default 0.005)")
    rounds.add_argument(
        "--mode",
        choices=("pairwise", "noloco", "elastic", "group", "hierarchical", "broadcast", "masked"),
        help="how nodes mix what they learned (default learn.mode); broadcast, with --codec sparse: slow links; "
        "masked, for four devices or more, shows nobody what one device has learned",
    )
    rounds.add_argument("--codec", choices=("int8", "int4", "sparse"), help="bytes of what is sent (default int8)")
    rounds.add_argument(
        "--mixes",
        type=int,
        metavar="N",
        help="exchanges of one round (default 2; 0: as many as the exact mean takes)",
    )
    rounds.add_argument("--wait", type=int, metavar="SECONDS", help="for a late partner (default 600)")
    rounds.add_argument("--least", type=int, metavar="N", help="participants before the first round (default 2)")
    rounds.add_argument("--gate", type=int, metavar="N", help="samples that judge one delta (default 64; 0: none)")
    frame = parser.add_argument_group("what is trained")
    frame.add_argument(
        "--start",
        metavar="CID",
        help="of the adapter that all begin with; `released` (default), if it has the same layers, targets, rank and "
        "alpha, or `none`",
    )
    frame.add_argument("--layers", metavar="FIRST-LAST", help="like 20-29, or all (default: the upper third)")
    frame.add_argument("--targets", metavar="NAMES", help="of q,k,v,o,gate,up,down, or all (default q,v)")
    frame.add_argument("--rank", type=int, metavar="N", help="of the factors (default 8)")
    frame.add_argument("--alpha", type=int, metavar="N", help="default 16")
    frame.add_argument("--factors", choices=("both", "alternating", "b"), help="that are trained (default both)")
    frame.add_argument("--period", type=int, metavar="N", help="rounds until the other factor's turn (alternating)")


def lesson_options(arguments: argparse.Namespace) -> dict[str, object]:
    """What was said of the lesson."""
    names = "rounds steps batch rate mode codec mixes wait least gate layers targets rank alpha factors period start"
    return {name: value for name in names.split() if (value := getattr(arguments, name)) is not None}


def run(arguments: argparse.Namespace) -> int:
    return {"start": _start, "stop": _stop, "status": _status}[arguments.action](arguments)


def _start(arguments: argparse.Namespace) -> int:
    options = lesson_options(arguments)
    if arguments.model is not None:
        options["model"] = arguments.model
    said = client_of(arguments).learn_start(arguments.suite, **options)
    if arguments.json:
        print(json.dumps(said))
        return 0
    first, last = said["layers"]
    print(
        f"The network learns: {said['rounds']} rounds of {said['steps']} steps, {said['parameters']} parameters in "
        f"the layers {first} to {last - 1} ({', '.join(said['targets'])}), {said['mode']}."
    )
    print("Every device takes part whose owner has set learn.enabled and that has samples: meshnode learn status")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    client_of(arguments).learn_stop()
    print("This node's lesson is taken back. What was learned stays on each device.")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    learning = client_of(arguments).status().learning
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps(asdict(learning)))
        return 0
    print(learning_line(learning))
    if learning.losses:
        print(f"loss:     {curve(learning.losses)}  {learning.losses[0]:.3f} to {learning.losses[-1]:.3f}")
    if learning.published:
        print(
            f"deltas:   {learning.published} given ({format_size(learning.sent_bytes)}), {learning.mixed} of others "
            f"mixed in ({format_size(learning.fetched_bytes)} fetched)"
        )
    for reason, count in sorted(learning.skipped.items()):
        print(f"passed over: {count} times a partner, because {printable(reason)}")
    for sentence in learning.refusals:
        print(f"refused:  {printable(sentence)}")
    return 0


def learning_line(learning: LearningStatus) -> str:
    """How it goes, in a line."""
    why = f": {printable(learning.why)}" if learning.why else ""
    if not learning.lesson:
        return f"{learning.state}{why}"
    where = (
        f"round {learning.round} of {learning.rounds}" if learning.state != "done" else f"{learning.rounds} rounds"
    )
    paused = ", paused for a question" if learning.paused else ""
    return f"{learning.state}, {where}, {learning.steps} steps, {len(learning.participants)} devices{paused}{why}"


def curve(losses: tuple[float, ...]) -> str:
    """A line of bars, the newest loss at the right."""
    shown = [loss for loss in losses if loss == loss][-WIDTH:]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    height = (high - low) or 1.0
    return "".join(_BARS[round((loss - low) / height * (len(_BARS) - 1))] for loss in shown)
