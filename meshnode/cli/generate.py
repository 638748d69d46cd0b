"""`meshnode generate`: one prompt, one answer, token by token."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from meshnode.api.messages import Answer, Replaced
from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of
from meshnode.client import Client
from meshnode.core.errors import ConfigError, DiskError
from meshnode.core.printable import printable
from meshnode.core.reasons import cause
from meshnode.core.sizes import counted
from meshnode.text.question import Options, Prompt, Question, question
from protocols.errors import MeshError
from protocols.ids import short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("prompt", nargs="*", help="what to answer (or --prompt-file)")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file; - for stdin")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write a receipt with tokens, route and times")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How to answer; shared with `chat` and the harness."""
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system turn of the conversation")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="X", help="default 0.7; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.9, metavar="X", help="default 0.9; 1: off")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="0: off")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="share of the best one's probability; 0: off"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1: off")
    for name in ("presence", "frequency"):
        parser.add_argument(f"--{name}-penalty", type=float, default=0.0, metavar="X", help="-2 to 2; 0: off")
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same answer")
    parser.add_argument(
        "--adapter", metavar="CID", help="answer with this adapter, or none; default: the one that is released"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )


def asked(arguments: argparse.Namespace, prompt: Prompt) -> Question:
    """The prompt with the flags. Raises BadRequest, before any node is asked."""
    options: Options = {
        "max_tokens": arguments.max_tokens,
        "temperature": 0 if arguments.greedy else arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "presence_penalty": arguments.presence_penalty,
        "frequency_penalty": arguments.frequency_penalty,
        "seed": arguments.seed,
        "stop": arguments.stop,
        "raw": arguments.raw,
    }
    if arguments.adapter is not None:
        options["adapter"] = arguments.adapter
    return question(prompt, options)


def asked_once(arguments: argparse.Namespace) -> Question:
    """The question of a command line or prompt file. Raises ConfigError, BadRequest."""
    words = arguments.prompt if isinstance(arguments.prompt, str) else " ".join(arguments.prompt)
    if words and arguments.prompt_file is not None:
        raise ConfigError("give a prompt or --prompt-file, not both")
    text = words if arguments.prompt_file is None else _read(arguments.prompt_file)
    if not text.strip():
        raise ConfigError('the prompt is empty; ask something, as in: meshnode generate "Why is the sky blue?"')
    if arguments.system and not arguments.raw:
        return asked(arguments, [{"role": "system", "content": arguments.system}, {"role": "user", "content": text}])
    return asked(arguments, text)


def _read(path: Path) -> str:
    source = "standard input" if str(path) == "-" else f"the prompt file {path}"
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} can't be read: {cause(error)}") from error


def run(arguments: argparse.Namespace) -> int:
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise DiskError(f"the receipt {arguments.json} can't be written: there is no folder for it")
    answer = print_answer(client_of(arguments), asked_once(arguments))
    print()
    if arguments.json:
        write_json(arguments.json, answer.as_json())
    receipt = answer.receipt
    facts = [f"answer {answer.id}"] if answer.id else []
    if receipt.decode_tok_s:
        speed = f"{receipt.decode_tok_s} tok/s, first after {receipt.ttft_ms:.0f} ms"
        facts[:0] = [counted(len(answer.token_ids), "token"), speed, counted(len(receipt.route), "stage")]
    if receipt.cached_tokens:
        facts.append(f"{receipt.cached_tokens} of {len(answer.prompt_token_ids)} tokens of the prompt were kept")
    if receipt.adapter:
        facts.append(f"adapter {short(receipt.adapter)}")
    if facts:
        print(f"[{', '.join(facts)}]", file=sys.stderr)
    for loss in receipt.replaced:
        print(f"[{_loss_words(loss)}]", file=sys.stderr)
    return 0


def _loss_words(loss: Replaced) -> str:
    """A stage that was lost, and how the answer went on without it."""
    what = f"layers {loss.first}-{loss.last - 1} of {short(loss.peer)} were" if loss.peer else "a stage was"
    went_on = f"the answer went on after {loss.gap_ms / 1000:.1f} s" if loss.gap_ms else "no token came after that"
    return f"{what} lost after {counted(loss.tokens, 'token')}; {went_on}: {printable(loss.reason)}"


def print_answer(node: Client, question: Question) -> Answer:
    """Print the pieces as they come; the whole answer."""

    shown = ""

    def waiting(why: str) -> None:
        breaks = "\n" if shown and not shown.endswith("\n") else ""  # in the middle of an answer, on the same screen
        print(f"{breaks}Waiting for the mesh: {printable(why)}.", file=sys.stderr)

    with node.ask(question, waiting=waiting) as pieces:
        try:
            for piece in pieces:
                shown = printable(piece.text, keep="\n\t") or shown
                print(printable(piece.text, keep="\n\t"), end="", flush=True)
            return pieces.whole()
        except MeshError:
            if shown and not shown.endswith("\n"):
                print(flush=True)  # what was wrong is said on a line of its own
            raise


def write_json(path: Path, receipt: dict[str, Any]) -> None:
    """Keep a receipt. Raises DiskError."""
    try:
        path.write_text(json.dumps(receipt, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DiskError(f"the receipt {path} can't be written: {error.strerror or error}") from error
