"""`meshnode chat`: a conversation. Ctrl-C stops the answer, not the node; Ctrl-D ends the conversation."""

from __future__ import annotations

import argparse
import sys

from meshnode import client
from meshnode.cli.generate import add_sampling, request_of, stream
from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of
from meshnode.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_sampling(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.raw:
        raise ConfigError("chat speaks in turns; for raw text use: meshnode generate --raw")
    if not client.is_running(folder_of(arguments)):
        raise client.not_running(folder_of(arguments))
    turns = [{"role": "system", "content": arguments.system}] if arguments.system else []
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - arrow keys and history at the prompt

        print("Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            text = input("you: " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not text:
            continue
        turns.append({"role": "user", "content": text})
        try:
            answer = stream(folder_of(arguments), request_of(arguments, messages=turns))
        except KeyboardInterrupt:
            print("  [stopped]")
            turns.pop()
            continue
        print()
        turns.append({"role": "assistant", "content": answer["text"]})
