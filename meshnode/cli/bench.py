"""`meshnode bench`: how fast, on this machine, now. Ratios come from one run in which both sides take turns."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from meshnode.cli.harness import running, write_receipt
from meshnode.cli.model import VARIANTS
from meshnode.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="WHAT", required=True)
    decode = actions.add_parser("decode", help="tokens per second of a mesh beside one process")
    decode.add_argument("--nodes", type=int, default=3, metavar="N")
    decode.add_argument("--variant", choices=VARIANTS, default="int4")
    decode.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    decode.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5; the medians are shown")
    decode.add_argument("--tokens", type=int, default=96, metavar="N", help="length of an answer (default 96)")
    decode.add_argument("--memory", metavar="SIZE[,SIZE...]", help="default: just so much that all nodes are needed")
    decode.add_argument("--dir", type=Path, metavar="FOLDER", help="keep the data folders here (default: removed)")
    decode.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here between runs")
    decode.add_argument("--json", type=Path, metavar="OUT")
    decode.set_defaults(bootstrap=False, engine="onnx")
    content = actions.add_parser("content", help="megabytes per second from one peer, three, slow and corrupt ones")
    content.add_argument("--size-mb", type=int, default=500, metavar="N")
    content.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5; the medians are shown")
    content.add_argument("--cases", default="one,three,trouble,killed", metavar="CASE[,CASE...]")
    content.add_argument("--json", type=Path, metavar="OUT")
    placement = actions.add_parser("placement", help="the planner beside the optimum (needs scipy)")
    placement.add_argument("--json", type=Path, metavar="OUT")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "decode":
        return _decode(arguments)
    if arguments.action == "content":
        from meshnode.bench import content

        if arguments.size_mb < 1 or arguments.rounds < 1:
            raise ConfigError("--size-mb and --rounds take 1 or more")
        cases = arguments.cases.split(",")
        if not set(cases) <= set(content.CASES):
            raise ConfigError(f"--cases takes some of {','.join(content.CASES)}, not {arguments.cases}")
        words = ["--size-mb", str(arguments.size_mb), "--rounds", str(arguments.rounds), "--cases", *cases]
        return content.main(words + (["--json", str(arguments.json)] if arguments.json else []))
    from meshnode.bench import placement

    return placement.main(["--json", str(arguments.json)] if arguments.json else [])


def _decode(arguments: argparse.Namespace) -> int:
    import os

    from meshnode.bench.decode import measure
    from meshnode.bench.machine import line
    from meshnode.harness.published import cache_folder, published

    if arguments.rounds < 1 or arguments.tokens < 2:
        raise ConfigError("--rounds takes 1 or more, --tokens 2 or more")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with running(arguments) as mesh:
        mesh.wait_ready()
        cache = (arguments.cache or cache_folder(os.environ)).absolute()
        folder = published(arguments.model, (arguments.variant,), cache)
        result = measure(mesh, folder, arguments.variant, rounds=arguments.rounds, tokens=arguments.tokens, say=say)
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    print(
        f"{result['variant']} over {result['nodes']} nodes: {result['mesh_tok_s']:.1f} tok/s; one process "
        f"{result['single_tok_s']:.1f}; ratio {result['ratio']:.2f}; same tokens: {result['tokens_equal']}\n"
        f"4 sessions: {result['mesh_concurrent4_tok_s']:.1f} tok/s, {result['concurrent4_gain']:.2f} times one\n"
        f"first token after 32: {result['mesh_ttft_ms_32']:.0f} ms (one process {result['single_ttft_ms_32']:.0f}), "
        f"after 512: {result['mesh_ttft_ms_512']:.0f} ms ({result['single_ttft_ms_512']:.0f})\n"
        f"memory of the nodes: {', '.join(f'{mb:.0f}' for mb in result['nodes_rss_mb'])} MB, of it weights "
        f"{', '.join(f'{mb:.0f}' for mb in result['nodes_weights_mb'])}"
    )
    return 0
