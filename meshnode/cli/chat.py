"""`meshnode chat`: a conversation. Ctrl-C stops the answer, not the node; Ctrl-D ends the conversation."""

from __future__ import annotations

import argparse
import io
import sys

from meshnode.cli.generate import add_sampling, asked, print_answer
from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of
from meshnode.core.errors import BadRequest, ConfigError
from meshnode.core.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_sampling(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.raw:
        raise ConfigError("chat speaks in turns; for raw text use: meshnode generate --raw")
    turns = [{"role": "system", "content": arguments.system}] if arguments.system else []
    asked(arguments, [*turns, {"role": "user", "content": "hello"}])  # flags that can't be used are told now
    node = client_of(arguments)
    node.check()
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text does not end the conversation
    code = 0
    if interactive:
        import readline  # noqa: F401 - arrow keys and history at the prompt

        print("Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            text = input("you: " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return code
        if not text:
            continue
        turns.append({"role": "user", "content": text})
        try:
            answer = print_answer(node, asked(arguments, turns))
        except BadRequest as error:
            print(f"That line is not taken: {printable(str(error))}.", file=sys.stderr)
            turns.pop()
            code = 0 if interactive else error.exit_code
            continue
        except KeyboardInterrupt:
            print("  [stopped]")
            turns.pop()
            continue
        print()
        if interactive and answer.id:
            print(f"  [answer {answer.id}]", file=sys.stderr)
        turns.append({"role": "assistant", "content": answer.text})
