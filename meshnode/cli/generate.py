"""`meshnode generate`: one prompt, one answer, token by token."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from meshnode import client
from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of
from meshnode.core.errors import ConfigError, DiskError


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
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1: off")
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same answer")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )


def request_of(arguments: argparse.Namespace, **question: Any) -> dict[str, Any]:
    """A `generate` request of the control socket."""
    import secrets

    seed = secrets.randbits(62) if arguments.seed is None else arguments.seed
    return {
        "do": "generate",
        "max_tokens": arguments.max_tokens,
        "temperature": 0 if arguments.greedy else arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": seed,
        "stop": arguments.stop,
        **question,
    }


def question_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The prompt of the command line or file, as chat turns or raw text. Raises ConfigError."""
    words = arguments.prompt if isinstance(arguments.prompt, str) else " ".join(arguments.prompt)
    if words and arguments.prompt_file is not None:
        raise ConfigError("give a prompt or --prompt-file, not both")
    text = words if arguments.prompt_file is None else _read(arguments.prompt_file)
    if not text.strip():
        raise ConfigError('the prompt is empty; ask something, as in: meshnode generate "Why is the sky blue?"')
    if arguments.raw:
        return {"prompt": text}
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return {"messages": [*system, {"role": "user", "content": text}]}


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the prompt file {path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt file {path} is no UTF-8 text (byte {error.start})") from error


def run(arguments: argparse.Namespace) -> int:
    done = stream(folder_of(arguments), request_of(arguments, **question_of(arguments)))
    print()
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(done, indent=2), encoding="utf-8")
        except OSError as error:
            raise DiskError(f"the receipt {arguments.json} can't be written: {error.strerror or error}") from error
    if done.get("decode_tok_s"):
        stages = len(done["route"])
        print(
            f"[{len(done['token_ids'])} tokens, {done['decode_tok_s']} tok/s, first after {done['ttft_ms']:.0f} ms, "
            f"{stages} stage{'s' if stages != 1 else ''}]",
            file=sys.stderr,
        )
    return 0


def stream(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Print the pieces as they come; the receipt."""
    for answer in client.ask(folder, request):
        if "done" in answer:
            receipt: dict[str, Any] = answer["done"]
            return receipt
        if "waiting" in answer:
            print(f"Waiting for the mesh: {_safe(answer['waiting'])}.", file=sys.stderr)
        else:
            print(_safe(answer["text"]), end="", flush=True)
    raise client.NodeError("gone", "the node ended the answer without a receipt")


def _safe(text: str) -> str:
    """No terminal control sequences out of a model's mouth; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
