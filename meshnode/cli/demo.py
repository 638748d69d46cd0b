"""`meshnode demo`: a mesh comes into being on this machine, step by step, and answers a question."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshnode.cli.generate import add_sampling, asked_once, print_answer
from meshnode.cli.harness import running, summary, write_receipt
from meshnode.cli.model import VARIANTS
from meshnode.core.sizes import counted, format_size
from protocols.words import layers

if TYPE_CHECKING:
    from meshnode.harness.mesh import Mesh

NODES: Final = 3
QUESTION: Final = "Name the planets of the solar system."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default=QUESTION, help=f"what to ask (default: {QUESTION})")
    parser.add_argument("--variant", choices=VARIANTS, default="int4")
    parser.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    parser.add_argument("--dir", type=Path, metavar="FOLDER", help="keep the data folders here (default: removed)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here between runs")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the receipt here")
    add_sampling(parser)
    parser.set_defaults(
        nodes=NODES, bootstrap=True, memory=None, engine="onnx", greedy=True, max_tokens=96, prompt_file=None
    )


def run(arguments: argparse.Namespace) -> int:
    from meshnode.harness.receipt import complete

    began = time.monotonic()
    question = asked_once(arguments)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", flush=True)

    say(f"Publishing {arguments.model} in {arguments.variant}, unless that was done before.")
    with running(arguments) as mesh:
        first = mesh.serving[0]
        say(f"{len(mesh.members)} processes run, each with a data folder of its own. {first.name} has the model.")
        mesh.wait_ready()
        _show(mesh)
        say("A probe token has passed through the whole chain, asked for by each node in turn: the mesh is ready.")
        asker = mesh.serving[-1]
        say(f"{asker.name} is asked: {arguments.prompt}\n")
        receipt = complete(mesh, asker, print_answer(asker.client, question))
    receipt = {"variant": arguments.variant, "cold_start_s": mesh.cold_start_s, **receipt}
    print(f"\n\n{summary(receipt)}\n")
    write_receipt(arguments.json, receipt)
    say("Every node was stopped." + (f" The receipt: {arguments.json}" if arguments.json else ""))
    return 0


def _show(mesh: Mesh) -> None:
    """Who found whom, who holds what, and what had to be fetched for it."""
    for member in mesh.members:
        status = member.status()
        first, last = status.me.first, status.me.last
        found = sum(peer.connected for peer in status.peers)
        held = "serves no layers" if first is None or last is None else f"serves {layers(first, last)}"
        fetched = f"fetched {format_size(status.content.fetched_bytes)}"
        source = "has the whole model" if member is mesh.serving[0] else fetched
        line = f"{member.name:<10} found {counted(found, 'peer')}, {held}"
        print(f"           {line}, {source}" if member.serves else f"           {line}")
