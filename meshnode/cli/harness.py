"""`meshnode harness`: a whole mesh on this machine, to try things out and to test."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnode.cli.learn import add_lesson, lesson_options
from meshnode.cli.model import VARIANTS, StepProgress
from meshnode.core.errors import ConfigError, DiskError
from meshnode.core.sizes import counted
from protocols.words import layers

if TYPE_CHECKING:
    from meshnode.harness.mesh import Mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from meshnode.cli.generate import add_sampling

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="make a mesh, or start the one in the folder again")
    _add_dir(up)
    _add_mesh(up, nodes=None)
    up.add_argument(
        "--wait",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for a probe token, when there is a model (default 120)",
    )
    _add_dir(actions.add_parser("down", help="stop every node in good order"))
    for name, text in (
        ("kill", "end a node and its engine at once, as a power cut does"),
        ("pause", "freeze a node and its engine, as a machine that hangs does"),
        ("resume", "let a paused node go on"),
        ("stop", "ask one node to leave in good order"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("node", metavar="NODE", help="name or peer id")
        _add_dir(action)
    add = actions.add_parser("add", help="one more node")
    add.add_argument("--memory", default="1GB", metavar="SIZE")
    _add_dir(add)
    logs = actions.add_parser("logs", help="what the nodes wrote, in order of time")
    logs.add_argument("node", nargs="?", metavar="NODE", help="only this node")
    _add_dir(logs)
    _add_dir(actions.add_parser("status", help="one line per node"))
    learn = actions.add_parser("learn", help="nodes learn, each from a file of its own; how good each becomes")
    learn.add_argument("--nodes", type=int, metavar="N", help="default: as many as there are files")
    learn.add_argument(
        "--train",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help='one for each node: lines {"input": ..., "label": ...}',
    )
    learn.add_argument("--heldout", type=Path, required=True, metavar="FILE", help="the same, that nobody trains on")
    learn.add_argument("--hostile", type=int, default=0, metavar="K", help="the last K nodes attack (default 0)")
    learn.add_argument("--attack", default="", metavar="NAME", help="what they do")
    learn.add_argument("--no-comparison", action="store_true", help="do not train alone and by FedAvg, too")
    learn.add_argument("--seed", type=int, default=1, metavar="S", help="of the frame and of batches (default 1)")
    learn.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    learn.add_argument("--dir", type=Path, metavar="FOLDER", help="keep the data folders here (default: removed)")
    learn.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    learn.add_argument("--variant", choices=VARIANTS, default="int4", help="that is published beside `train`")
    learn.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here between runs")
    add_lesson(learn)
    shown = actions.add_parser("demo-learn", help="two tasks: four nodes learn, a fifth serves what they learned")
    shown.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the curves and the figures")
    shown.add_argument("--task", choices=("intents", "logs"), help="only this one (default: both)")
    shown.add_argument("--cache", type=Path, metavar="FOLDER", help="models and data are kept here between runs")
    generate = actions.add_parser("generate", help="start a mesh, answer one prompt, stop it, write a receipt")
    generate.add_argument("prompt", nargs="*", help="what to answer (or --prompt-file)")
    generate.add_argument("--prompt-file", type=Path, metavar="FILE")
    generate.add_argument("--json", type=Path, metavar="OUT", help="write the receipt here")
    generate.add_argument("--dir", type=Path, metavar="FOLDER", help="keep the data folders here (default: removed)")
    _add_mesh(generate, nodes=3)
    add_sampling(generate)


def _add_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, required=True, metavar="FOLDER", help="where the nodes' data folders are")


def _add_mesh(parser: argparse.ArgumentParser, nodes: int | None) -> None:
    parser.add_argument("--nodes", type=int, default=nodes, metavar="N", help="serving nodes")
    parser.add_argument(
        "--memory",
        metavar="SIZE[,SIZE...]",
        help="serve.memory for all, or for each; default with a model: just so much that all are needed",
    )
    parser.add_argument("--bootstrap", action="store_true", help="a bootstrap peer is the meeting point")
    parser.add_argument("--model", metavar="PATH_OR_PACKAGE", help="published once, given to the first node")
    parser.add_argument("--variant", choices=VARIANTS, default="int4")
    parser.add_argument("--engine", choices=("onnx", "null"), default="onnx")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here between runs")


def run(arguments: argparse.Namespace) -> int:
    actions = {
        "up": _up,
        "down": _down,
        "kill": _signal,
        "pause": _signal,
        "resume": _signal,
        "stop": _stop,
        "add": _add,
        "logs": _logs,
        "status": _status,
        "generate": _generate,
        "learn": _learn,
        "demo-learn": _demo_learn,
    }
    return actions[arguments.action](arguments)


def make(arguments: argparse.Namespace, folder: Path) -> Mesh:
    """A new mesh as the flags say; nothing runs yet."""
    import os

    from meshnode.harness.mesh import Mesh, Plan
    from meshnode.harness.published import cache_folder, published

    source = None
    if arguments.model is not None:
        cache = arguments.cache or cache_folder(os.environ)
        source = published(arguments.model, (arguments.variant,), cache.absolute(), StepProgress())
    memory = tuple(arguments.memory.split(",")) if arguments.memory else ()
    plan = Plan(
        nodes=arguments.nodes,
        memory=memory,
        bootstrap=arguments.bootstrap,
        published=source,
        variant=arguments.variant,
        settings=(("serve.engine", arguments.engine),),
    )
    return Mesh.make(folder.absolute(), plan)


def _up(arguments: argparse.Namespace) -> int:
    from meshnode.harness.mesh import FILE, Mesh

    folder = arguments.dir.absolute()
    if (folder / FILE).exists():
        if arguments.nodes is not None or arguments.model is not None:
            raise ConfigError(
                f"{folder} holds a mesh already: start it without --nodes and --model, or remove the folder"
            )
        mesh = Mesh.open(folder)
    elif arguments.nodes is None:
        raise ConfigError(f"there is no mesh in {folder} yet; say how many nodes to make with --nodes N")
    else:
        mesh = make(arguments, folder)
    mesh.up()
    if mesh.has_model():
        mesh.wait_ready(arguments.wait)
        mesh.save()
    print(f"{counted(len(mesh.members), 'node runs', 'nodes run')}; {folder / FILE} says where. Stop them with:\n")
    print(f"    meshnode harness down --dir {folder}")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from meshnode.harness.mesh import Mesh

    mesh = Mesh.open(arguments.dir.absolute())
    mesh.down()
    print(f"{counted(len(mesh.members), 'node is', 'nodes are')} stopped.")
    return 0


def _signal(arguments: argparse.Namespace) -> int:
    from meshnode.harness.mesh import Mesh

    number = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP, "resume": signal.SIGCONT}[arguments.action]
    mesh = Mesh.open(arguments.dir.absolute())
    member = mesh.member(arguments.node)
    member.signal(number)
    if number == signal.SIGKILL:
        member.wait_stopped()
    mesh.save()
    print(f"{member.name}: {number.name} sent.")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from meshnode.harness.mesh import Mesh

    mesh = Mesh.open(arguments.dir.absolute())
    member = mesh.member(arguments.node)
    member.stop()
    member.wait_stopped()
    mesh.save()
    print(f"{member.name} has left.")
    return 0


def _add(arguments: argparse.Namespace) -> int:
    from meshnode.harness.mesh import Mesh

    member = Mesh.open(arguments.dir.absolute()).add(arguments.memory)
    print(f"{member.name} runs as {member.peer_id}.")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from meshnode.harness.mesh import Mesh

    mesh = Mesh.open(arguments.dir.absolute())
    members = mesh.members if arguments.node is None else [mesh.member(arguments.node)]
    lines = [line for member in members for line in _log_lines(member.name, member.log)]
    for _, name, text in sorted(lines, key=lambda line: line[0]):
        print(f"{name:<10} {text}")
    return 0


def _log_lines(name: str, path: Path) -> Iterator[tuple[str, str, str]]:
    """(time, node, line). A line that is no JSON (a traceback) keeps the time of the one before."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"{path} can't be read: {error.strerror or error}") from error
    when = ""
    for line in text.splitlines():
        with suppress(ValueError, AttributeError):
            when = str(json.loads(line).get("timestamp", when))
        yield when, name, line


def _status(arguments: argparse.Namespace) -> int:
    from meshnode.core.errors import NodeError, NotRunning
    from meshnode.harness.mesh import Mesh
    from meshnode.harness.receipt import node_line

    for member in Mesh.open(arguments.dir.absolute()).members:
        if member.process() is None:
            print(f"{member.name:<10} does not run")
            continue
        try:
            line = node_line(member)
        except (NodeError, NotRunning) as error:
            print(f"{member.name:<10} {error}")
            continue
        span = line["layers"]
        held = "no layers" if span is None else layers(*span)
        print(f"{member.name:<10} {held:<16} {line['rss_mb']:6.0f} MB  process {line['pid']}  {member.folder}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from meshnode.cli.generate import asked_once
    from meshnode.harness.receipt import ask

    if arguments.model is None:
        raise ConfigError("say which model: --model example:smollm2, a Hugging Face folder or a .gguf file")
    question = asked_once(arguments)
    with running(arguments) as mesh:
        mesh.wait_ready()
        receipt = ask(mesh, question)
    receipt = {"variant": arguments.variant, "cold_start_s": mesh.cold_start_s, **receipt}
    write_receipt(arguments.json, receipt)
    print(receipt["text"])
    print(summary(receipt), file=sys.stderr)
    return 0


def _learn(arguments: argparse.Namespace) -> int:
    import os

    from meshnode.harness.learn import Experiment, learn, table
    from meshnode.harness.published import cache_folder, published
    from protocols.manifest.messages import TRAIN

    if arguments.nodes not in (None, len(arguments.train)):
        raise ConfigError(f"--nodes {arguments.nodes} needs as many files; --train names {len(arguments.train)}")
    cache = arguments.cache or cache_folder(os.environ)
    source = published(arguments.model, (arguments.variant, TRAIN), cache.absolute(), StepProgress())
    experiment = Experiment(
        trains=[path.absolute() for path in arguments.train],
        heldout=arguments.heldout.absolute(),
        published=source,
        variant=arguments.variant,
        hostile=arguments.hostile,
        attack=arguments.attack,
        options={"seed": arguments.seed, **lesson_options(arguments)},
        compared=() if arguments.no_comparison else ("alone", "fedavg"),
    )
    with tempfile.TemporaryDirectory(prefix="meshnode-") as temporary:
        result = learn(experiment, (arguments.dir or Path(temporary)).absolute(), Since().say)
    print(f"\n{table(result)}")
    write_receipt(arguments.json, result)
    return 0


def _demo_learn(arguments: argparse.Namespace) -> int:
    import os

    from meshnode.harness.demo_learn import LESSONS, demo, draw
    from meshnode.harness.published import cache_folder, published
    from protocols.manifest.messages import TRAIN

    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    since = Since()
    since.say("Publishing SmolLM2 in int4 and for training, unless that was done before.")
    source = published("example:smollm2", ("int4", TRAIN), cache, StepProgress())
    lessons = [lesson for lesson in LESSONS if arguments.task in (None, lesson.name)]
    with tempfile.TemporaryDirectory(prefix="meshnode-") as temporary:
        results = demo(source, Path(temporary), cache, since.say, lessons)
    out = arguments.out.absolute()
    drawn = draw(results, out)
    write_receipt(out / "learn.json", {"tasks": results})
    since.say(f"The curves: {', '.join(str(path) for path in drawn)}; all figures: {out / 'learn.json'}")
    return 0


class Since:
    """Says things with the seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] {text}", flush=True)


@contextmanager
def running(arguments: argparse.Namespace) -> Iterator[Mesh]:
    """A mesh as the flags say, started, and stopped again whatever happens."""
    with tempfile.TemporaryDirectory(prefix="meshnode-") as temporary:
        mesh = make(arguments, arguments.dir or Path(temporary))
        try:
            mesh.up()
            yield mesh
        finally:
            mesh.down()


def write_receipt(path: Path | None, receipt: dict[str, Any]) -> None:
    """Keep a receipt, if somebody wants it. Raises DiskError."""
    from meshnode.cli.generate import write_json

    if path is not None:
        write_json(path, receipt)


def summary(receipt: dict[str, Any]) -> str:
    """A receipt in a few lines."""
    head = (
        f"{counted(len(receipt['token_ids']), 'token')}, first after {receipt['ttft_ms']:.0f} ms, "
        f"then {receipt['decode_tok_s'] or 0:.0f} tok/s through {counted(len(receipt['route']), 'stage')}:"
    )
    lines = [head]
    lines += [
        f"  {hop['name']:<10} {layers(hop['first'], hop['last']):<16}  network {hop['network_ms']:.2f} ms  "
        f"compute {hop['compute_ms']:.2f} ms"
        for hop in receipt["hops"]
    ]
    lines += [
        f"  {node['name']:<10} {node['rss_mb']:.0f} MB of memory, {node['bytes_fetched'] / 1e6:.1f} MB fetched"
        for node in receipt["nodes"]
    ]
    return "\n".join(lines)
