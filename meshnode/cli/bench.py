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
    prefix = actions.add_parser(
        "prefix", help="the first token of a chat's second turn, with its history kept and not"
    )
    prefix.add_argument("--nodes", type=int, default=3, metavar="N", help="of each of two meshes (default 3)")
    prefix.add_argument("--variant", choices=VARIANTS, default="int4")
    prefix.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    prefix.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5; the medians are shown")
    prefix.add_argument("--tokens", type=int, default=32, metavar="N", help="length of an answer (default 32)")
    prefix.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    prefix.add_argument("--json", type=Path, metavar="OUT")
    content = actions.add_parser("content", help="megabytes per second from one peer, three, slow and corrupt ones")
    content.add_argument("--size-mb", type=int, default=500, metavar="N")
    content.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5; the medians are shown")
    content.add_argument("--cases", default="one,three,trouble,killed", metavar="CASE[,CASE...]")
    content.add_argument("--json", type=Path, metavar="OUT")
    confinement = actions.add_parser("confinement", help="tokens per second of a confined engine beside a free one")
    confinement.add_argument("--variant", choices=VARIANTS, default="int4")
    confinement.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    confinement.add_argument("--rounds", type=int, default=11, metavar="N", help="default 11; the medians are shown")
    confinement.add_argument("--tokens", type=int, default=32, metavar="N", help="length of an answer (default 32)")
    confinement.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    confinement.add_argument("--json", type=Path, metavar="OUT")
    adapter = actions.add_parser("adapter", help="processor time per token with an adapter and without")
    adapter.add_argument("--variant", choices=VARIANTS, default="int4")
    adapter.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    adapter.add_argument("--rank", type=int, default=16, metavar="N", help="default 16")
    adapter.add_argument(
        "--targets", default="", metavar="NAME[,NAME...]", help="such as q_proj,v_proj; default: all"
    )
    adapter.add_argument("--first", type=int, default=0, metavar="N", help="layers below have none (default 0)")
    adapter.add_argument("--rounds", type=int, default=11, metavar="N", help="default 11; the medians are shown")
    adapter.add_argument("--tokens", type=int, default=32, metavar="N", help="length of an answer (default 32)")
    adapter.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    adapter.add_argument("--json", type=Path, metavar="OUT")
    placement = actions.add_parser("placement", help="the planner beside the optimum (needs scipy)")
    placement.add_argument("--json", type=Path, metavar="OUT")
    averaging = actions.add_parser("averaging", help="averaging without a coordinator, on toy tasks in virtual time")
    robust = actions.add_parser("robust", help="hostile learners against our rules and those of others, likewise")
    for parser_of in (averaging, robust):
        parser_of.add_argument("--seeds", type=int, default=3, metavar="N", help="default 3; means are shown")
        parser_of.add_argument("--rounds", type=int, default=60, metavar="N", help="default 60")
        parser_of.add_argument("--json", type=Path, metavar="OUT")
    factors = actions.add_parser("factors", help="which factors of adapters are trained, on real tasks (needs torch)")
    factors.add_argument("--task", choices=("intents", "logs"), default="intents")
    factors.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    factors.add_argument("--seeds", type=int, default=3, metavar="N", help="default 3; medians are shown")
    factors.add_argument("--first-seed", type=int, default=0, metavar="N", help="default 0")
    factors.add_argument("--dir", type=Path, metavar="FOLDER", help="keep the adapters here (default: removed)")
    factors.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    factors.add_argument("--json", type=Path, metavar="OUT")
    served = actions.add_parser("served", help="labels of served layers with an adapter beside torch (needs torch)")
    served.add_argument("--variants", default="int4", metavar="NAME[,NAME...]", help="default int4")
    served.add_argument("--task", choices=("intents", "logs"), default="intents")
    served.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    served.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    served.add_argument("--dir", type=Path, required=True, metavar="FOLDER", help="that bench factors --dir kept")
    served.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    served.add_argument("--json", type=Path, metavar="OUT")
    beside = actions.add_parser("beside", help="tokens per second while the same device trains (needs torch)")
    beside.add_argument("--variant", choices=VARIANTS, default="int4")
    beside.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    beside.add_argument("--rounds", type=int, default=11, metavar="N", help="default 11; the medians are shown")
    beside.add_argument("--tokens", type=int, default=32, metavar="N", help="length of an answer (default 32)")
    beside.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    beside.add_argument("--json", type=Path, metavar="OUT")
    privacy = actions.add_parser("privacy", help="what private training costs, what adapters tell (needs torch)")
    privacy.add_argument("--epsilon", type=float, default=8.0, metavar="E", help="default 8")
    privacy.add_argument("--steps", type=int, default=45, metavar="N", help="default 45")
    privacy.add_argument("--rate", type=float, default=5e-3, metavar="R", help="of learning (default 0.005)")
    privacy.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    privacy.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    privacy.add_argument("--json", type=Path, metavar="OUT")
    exchange = actions.add_parser("exchange", help="seconds of a round of averaging among four real nodes")
    exchange.add_argument("--mode", choices=("pairs", "group"), default="group")
    exchange.add_argument("--rounds", type=int, default=20, metavar="N", help="default 20; the median is shown")
    exchange.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    exchange.add_argument("--cache", type=Path, metavar="FOLDER", help="published models are kept here")
    exchange.add_argument("--json", type=Path, metavar="OUT")
    rollout = actions.add_parser("rollout", help="roll-outs of adapters among nodes of which some lie")
    rollout.add_argument("--seeds", type=int, default=100, metavar="N", help="runs of each case (default 100)")
    rollout.add_argument("--nodes", type=int, default=200, metavar="N", help="in each run (default 200)")
    rollout.add_argument("--json", type=Path, metavar="OUT")
    text = actions.add_parser("text", help="what the tokenizer's process adds to a question")
    text.add_argument("--model", default="example:smollm2", metavar="PATH_OR_PACKAGE")
    text.add_argument("--rounds", type=int, default=100, metavar="N", help="default 100; the medians are shown")
    text.add_argument("--json", type=Path, metavar="OUT")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "decode":
        return _decode(arguments)
    if arguments.action == "prefix":
        return _prefix(arguments)
    if arguments.action == "content":
        from meshnode.bench import content

        if arguments.size_mb < 1 or arguments.rounds < 1:
            raise ConfigError("--size-mb and --rounds take 1 or more")
        cases = arguments.cases.split(",")
        if not set(cases) <= set(content.CASES):
            raise ConfigError(f"--cases takes some of {','.join(content.CASES)}, not {arguments.cases}")
        words = ["--size-mb", str(arguments.size_mb), "--rounds", str(arguments.rounds), "--cases", *cases]
        return content.main(words + (["--json", str(arguments.json)] if arguments.json else []))
    if arguments.action == "confinement":
        return _confinement(arguments)
    if arguments.action == "adapter":
        return _adapter(arguments)
    if arguments.action == "rollout":
        from meshnode.bench import rollout

        if arguments.seeds < 1 or arguments.nodes < 5:
            raise ConfigError("--seeds takes 1 or more, --nodes 5 or more")
        words = ["--seeds", str(arguments.seeds), "--nodes", str(arguments.nodes)]
        return rollout.main(words + (["--json", str(arguments.json)] if arguments.json else []))
    if arguments.action == "factors":
        return _factors(arguments)
    if arguments.action == "beside":
        return _beside(arguments)
    if arguments.action == "privacy":
        return _privacy(arguments)
    if arguments.action == "exchange":
        return _exchange(arguments)
    if arguments.action == "served":
        return _served(arguments)
    if arguments.action == "text":
        return _text(arguments)
    if arguments.action in ("averaging", "robust"):
        from meshnode.bench import averaging, robust

        if arguments.seeds < 1 or arguments.rounds < 1:
            raise ConfigError("--seeds and --rounds take 1 or more")
        words = ["--seeds", str(arguments.seeds), "--rounds", str(arguments.rounds)]
        words += ["--json", str(arguments.json)] if arguments.json else []
        return averaging.main(words) if arguments.action == "averaging" else robust.main(words)
    from meshnode.bench import placement

    return placement.main(["--json", str(arguments.json)] if arguments.json else [])


def _decode(arguments: argparse.Namespace) -> int:
    import os

    from meshnode.bench.decode import measure
    from meshnode.bench.machine import line
    from meshnode.harness.published import cache_folder, published

    _check_counts(arguments)
    with running(arguments) as mesh:
        mesh.wait_ready()
        cache = (arguments.cache or cache_folder(os.environ)).absolute()
        folder = published(arguments.model, (arguments.variant,), cache)
        result = measure(mesh, folder, arguments.variant, rounds=arguments.rounds, tokens=arguments.tokens, say=_say)
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


def _prefix(arguments: argparse.Namespace) -> int:
    import os
    import tempfile
    from contextlib import ExitStack

    from meshnode.bench.machine import line
    from meshnode.bench.prefix import FORGETS, HISTORY, KEEPS, measure
    from meshnode.harness.mesh import Mesh, Plan
    from meshnode.harness.published import cache_folder, published

    _check_counts(arguments)
    if arguments.tokens >= HISTORY:
        raise ConfigError(f"--tokens takes less than {HISTORY}, the history of the chat")
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    folder = published(arguments.model, (arguments.variant,), cache)
    meshes: dict[str, Mesh] = {}
    with tempfile.TemporaryDirectory(prefix="meshnode-") as temporary, ExitStack() as running_ones:
        for side in (KEEPS, FORGETS):
            settings = (("serve.prefix_cache", side == KEEPS),)
            plan = Plan(arguments.nodes, published=folder, variant=arguments.variant, settings=settings)
            meshes[side] = Mesh.make(Path(temporary) / side, plan)
            running_ones.callback(meshes[side].down)
            meshes[side].up()
        for mesh in meshes.values():
            mesh.wait_ready()
        result = measure(meshes, folder, rounds=arguments.rounds, tokens=arguments.tokens, say=_say)
    write_receipt(arguments.json, {"variant": arguments.variant, **result})
    print(line(result["machine"]))
    print(
        f"{arguments.variant} over {result['nodes']} nodes, {result['kept_tokens']} of {result['prompt_tokens']} "
        f"tokens of the prompt kept:\n"
        f"first token after {result['with_ttft_ms']:.0f} ms, {result['without_ttft_ms']:.0f} without: "
        f"{result['sooner']:.1f} times as soon; same tokens: {result['tokens_equal']}"
    )
    return 0


def _confinement(arguments: argparse.Namespace) -> int:
    import os

    from meshnode.bench.confinement import measure
    from meshnode.bench.machine import line
    from meshnode.harness.published import cache_folder, published

    _check_counts(arguments)
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    folder = published(arguments.model, (arguments.variant,), cache)
    result = measure(folder, arguments.variant, rounds=arguments.rounds, tokens=arguments.tokens, say=_say)
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    print(
        f"{result['variant']}: confined {result['confined_decode_tok_s']:.1f} tok/s, free "
        f"{result['free_decode_tok_s']:.1f}; ratio {result['decode_tok_s_ratio']:.3f}; same tokens: "
        f"{result['tokens_equal']}\n"
        f"processor time per token: confined {result['confined_decode_cpu_ms']:.2f} ms, free "
        f"{result['free_decode_cpu_ms']:.2f}; ratio {result['decode_cpu_ms_ratio']:.3f}\n"
        f"first token: confined {result['confined_ttft_ms']:.0f} ms, free {result['free_ttft_ms']:.0f}; ratio "
        f"{result['ttft_ms_ratio']:.3f}\n"
        f"what holds here: {', '.join(result['holds']) or 'nothing'}"
    )
    return 0


def _adapter(arguments: argparse.Namespace) -> int:
    import os

    from meshnode.bench.adapter import measure
    from meshnode.bench.machine import line
    from meshnode.harness.published import cache_folder, published
    from meshnode.model.adapter_fit import MAX_RANK

    _check_counts(arguments)
    if not 1 <= arguments.rank <= MAX_RANK:
        raise ConfigError(f"--rank takes 1 to {MAX_RANK}")
    if arguments.first < 0:
        raise ConfigError("--first takes 0 or more")
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    result = measure(
        published(arguments.model, (arguments.variant,), cache),
        arguments.variant,
        rank=arguments.rank,
        targets=[name for name in arguments.targets.split(",") if name],
        first=arguments.first,
        rounds=arguments.rounds,
        tokens=arguments.tokens,
        say=_say,
    )
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    print(
        f"{result['variant']}, rank {result['rank']} on {', '.join(result['targets'])} of the layers from "
        f"{result['first']} on ({result['adapter_mb']} MB)\n"
        f"processor time per token: {result['plain_decode_cpu_ms']:.2f} ms; opened for adapters, without one "
        f"{result['open_decode_cpu_ms']:.2f}, ratio {result['open_ratio']:.3f}, same tokens: "
        f"{result['tokens_equal']}; with the adapter {result['adapted_decode_cpu_ms']:.2f}, ratio "
        f"{result['adapted_ratio']:.3f}; of the same engine {result['adapter_ratio']:.3f}"
    )
    return 0


def _factors(arguments: argparse.Namespace) -> int:
    import os
    import tempfile

    from meshnode.bench.factors import measure, table
    from meshnode.bench.machine import line
    from meshnode.harness.published import cache_folder, published
    from protocols.manifest.messages import TRAIN

    if arguments.seeds < 1 or arguments.first_seed < 0:
        raise ConfigError("--seeds takes 1 or more, --first-seed 0 or more")
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    folder = published(arguments.model, ("int4", TRAIN), cache)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    with tempfile.TemporaryDirectory(prefix="meshnode-factors-") as scratch:
        result = measure(folder, arguments.task, seeds, arguments.dir or Path(scratch), cache, _say)
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    print(table(result))
    return 0


def _beside(arguments: argparse.Namespace) -> int:
    import os
    import tempfile

    from meshnode.bench.beside import SIDES, measure
    from meshnode.bench.machine import line
    from meshnode.harness.published import cache_folder, published
    from protocols.manifest.messages import TRAIN

    _check_counts(arguments)
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    source = published(arguments.model, (arguments.variant, TRAIN), cache)
    with tempfile.TemporaryDirectory(prefix="meshnode-beside-") as folder:
        result = measure(
            source,
            arguments.variant,
            Path(folder),
            cache,
            rounds=arguments.rounds,
            tokens=arguments.tokens,
            say=_say,
        )
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    for side in SIDES:
        print(f"{side}: {result[side]['tok_s']:.1f} tok/s, first token after {result[side]['ttft_ms']:.0f} ms")
    print(
        f"beside training: {result['beside_ratio']:.2f} of the speed alone, {result['beside_later_ms']:+.0f} ms; "
        f"training that yields: {result['yielding_ratio']:.2f}, {result['yielding_later_ms']:+.0f} ms"
    )
    return 0


def _privacy(arguments: argparse.Namespace) -> int:
    import os
    import tempfile

    from meshnode.bench.machine import line
    from meshnode.bench.privacy import PLAIN, PRIVATE, measure
    from meshnode.harness.published import cache_folder, published
    from protocols.manifest.messages import TRAIN

    if arguments.steps < 1 or not (0.01 <= arguments.epsilon <= 1000 and 0 < arguments.rate <= 1):
        raise ConfigError("--steps takes 1 or more, --epsilon 0.01 to 1000, --rate above 0 to 1")
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    source = published(arguments.model, ("int4", TRAIN), cache)
    with tempfile.TemporaryDirectory(prefix="meshnode-privacy-") as folder:
        result = measure(
            source,
            Path(folder),
            cache,
            epsilon=arguments.epsilon,
            steps=arguments.steps,
            rate=arguments.rate,
            say=_say,
        )
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    for kind in (PLAIN, PRIVATE):
        found = result[kind]
        print(
            f"{kind}: {found['accuracy']:.1%} right, loss {found['loss']:.3f}; loss of samples trained on "
            f"{found['members_loss']:.3f}, of others {found['others_loss']:.3f}; area under the curve of an attack "
            f"on the loss {found['loss_auc']:.3f}, on its change {found['change_auc']:.3f}"
        )
    return 0


def _exchange(arguments: argparse.Namespace) -> int:
    import os
    import tempfile

    from meshnode.bench.exchange import NODES, measure
    from meshnode.bench.machine import line
    from meshnode.harness.published import cache_folder, published
    from protocols.manifest.messages import TRAIN

    if arguments.rounds < 3:
        raise ConfigError("--rounds takes 3 or more")
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    source = published(arguments.model, ("int4", TRAIN), cache)
    with tempfile.TemporaryDirectory(prefix="meshnode-exchange-") as folder:
        result = measure(source, Path(folder), arguments.mode, rounds=arguments.rounds, say=_say)
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    print(
        f"{result['parameters']} parameters among {NODES} nodes, {arguments.mode}: a round in "
        f"{result['round_s']:.3f} s ({result['quickest_s']:.3f} to {result['slowest_s']:.3f}), "
        f"{result['bytes_a_round_and_node'] / 1e3:.0f} kB fetched by each"
    )
    return 0


def _served(arguments: argparse.Namespace) -> int:
    import os

    from meshnode.bench.machine import line
    from meshnode.bench.served import measure
    from meshnode.harness.published import cache_folder, published
    from protocols.manifest.messages import TRAIN

    variants = [name for name in arguments.variants.split(",") if name]
    if not variants or not set(variants) <= set(VARIANTS):
        raise ConfigError(f"--variants takes some of {','.join(VARIANTS)}, not {arguments.variants}")
    cache = (arguments.cache or cache_folder(os.environ)).absolute()
    result = measure(
        published(arguments.model, (*variants, TRAIN), cache),
        variants,
        arguments.task,
        arguments.seed,
        arguments.dir,
        _say,
    )
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    print(f"{result['task']}, {result['samples']} held-out samples; torch in float32 {result['torch']:.1%} right")
    for name in variants:
        found = result[name]
        print(f"{name}: {found['accuracy']:.1%} right, {found['agreement']:.1%} as torch")
    return 0


def _check_counts(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 1 or arguments.tokens < 2:
        raise ConfigError("--rounds takes 1 or more, --tokens 2 or more")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _text(arguments: argparse.Namespace) -> int:
    from meshnode.bench.machine import line
    from meshnode.bench.text import QUESTIONS, measure

    if arguments.rounds < 1:
        raise ConfigError("--rounds takes 1 or more")
    result = measure(arguments.model, rounds=arguments.rounds)
    write_receipt(arguments.json, result)
    print(line(result["machine"]))
    for name in QUESTIONS:
        found = result[name]
        print(
            f"{name} question, {found['tokens']} tokens: {found['process_ms']:.2f} ms in the process, "
            f"{found['thread_ms']:.2f} in a thread; {found['more_ms']:.2f} ms more"
        )
    print(
        f"opened in {result['open_ms']:.0f} ms (in this process {result['open_in_process_ms']:.0f}); "
        f"{result['process_mb']:.0f} MB, its waiting fork {result['fork_mb']:.1f} MB of its own\n"
        f"an answer becomes text at {result['stream_us']:.1f} us per token "
        f"(the library {result['library_stream_us']:.1f})"
    )
    return 0
