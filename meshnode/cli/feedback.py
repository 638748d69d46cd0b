"""`meshnode feedback`: whether an answer was right, and what would have been."""

from __future__ import annotations

import argparse
import json

from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of
from meshnode.core.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("answer", metavar="ANSWER", help="the number that stands behind the answer")
    parser.add_argument("verdict", choices=("right", "wrong"))
    parser.add_argument("--label", default="", metavar="TEXT", help="what would have been the right answer")
    parser.add_argument("--json", action="store_true", help="what the node knows of it now, as JSON")


def run(arguments: argparse.Namespace) -> int:
    correct = arguments.verdict == "right"
    judged = client_of(arguments).feedback(arguments.answer, correct, label=arguments.label)
    if arguments.json:
        print(json.dumps(judged.as_json(), ensure_ascii=False))
        return 0
    label = printable(" ".join(judged.label.split()))
    learned = (
        f"the right one is kept as a sample: {label[:60]}" if judged.label else "--label says what would be right"
    )
    print(f"Answer {judged.answer} was {arguments.verdict}; {learned}")
    return 0
