"""`meshnode completion`: what a shell needs to complete commands and flags."""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshnode.cli.main import COMMANDS

HOW: Final = """\
  bash: meshnode completion bash > ~/.local/share/bash-completion/completions/meshnode
  zsh:  meshnode completion zsh > ~/.meshnode.zsh, and in ~/.zshrc: source ~/.meshnode.zsh
  fish: meshnode completion fish > ~/.config/fish/completions/meshnode.fish
"""


@dataclass(frozen=True, slots=True)
class Place:
    """What may stand behind a command: (word, what it does) each."""

    commands: Sequence[tuple[str, str]]  # or the words that an argument takes
    flags: Sequence[tuple[str, str]]

    @property
    def words(self) -> str:
        return " ".join(word for word, _ in (*self.commands, *self.flags))


Tree = Mapping[tuple[str, ...], Place]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose completion to print")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HOW


def run(arguments: argparse.Namespace) -> int:
    """Every command's module is imported here, and only here."""
    write = {"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell]
    print(write(tree()), end="")
    return 0


def tree() -> Tree:
    """All commands, with those below them. The key is the command's words; () is `meshnode` itself."""
    found: dict[tuple[str, ...], Place] = {
        (): Place([(name, line) for name, _, line in COMMANDS], [("--help", ""), ("--version", "")])
    }
    for name, module, _ in COMMANDS:
        parser = argparse.ArgumentParser(prog=name)
        importlib.import_module(module).add_arguments(parser)
        found.update(_places((name,), parser))
    return found


def _places(at: tuple[str, ...], parser: argparse.ArgumentParser) -> Iterator[tuple[tuple[str, ...], Place]]:
    commands: list[tuple[str, str]] = []
    flags: list[tuple[str, str]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands += [(choice.dest, choice.help or "") for choice in action._choices_actions]
            for name, below in action.choices.items():
                yield from _places((*at, name), below)
        elif action.option_strings:
            flags.append((action.option_strings[-1], _line(action)))
        elif action.choices:
            commands += [(str(choice), "") for choice in action.choices]
    yield at, Place(commands, flags)


def _line(action: argparse.Action) -> str:
    """The help of a flag as argparse prints it."""
    return "" if action.help in (None, argparse.SUPPRESS) else (action.help or "") % {"default": action.default}


def bash(tree: Tree) -> str:
    """Files where no command and no flag fits."""
    cases = "\n".join(
        f"    {shlex.quote(' '.join(at))}) words={shlex.quote(place.words)} ;;" for at, place in sorted(tree.items())
    )
    return f"""\
_meshnode_words() {{
  case "$1" in
{cases}
    *) return 1 ;;
  esac
}}
_meshnode() {{
  local at="" word words="" index
  for ((index = 1; index < COMP_CWORD; index++)); do
    word="${{COMP_WORDS[index]}}"
    if _meshnode_words "${{at:+$at }}$word"; then at="${{at:+$at }}$word"; fi
  done
  _meshnode_words "$at"
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _meshnode meshnode
"""


def zsh(tree: Tree) -> str:
    """Bash's, which zsh reads."""
    return f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{bash(tree)}"


def fish(tree: Tree) -> str:
    """With what each word does."""
    lines = [
        "function __meshnode_at",
        "  set -l words (commandline -opc)[2..]",
        "  test (count $words) -ge (count $argv); or return 1",
        "  test (string join -- ' ' $words[1..(count $argv)]) = (string join -- ' ' $argv)",
        "end",
    ]
    for at, place in sorted(tree.items()):
        where = " ".join(("__meshnode_at", *at))
        if not at:
            where = "test (count (commandline -opc)) -eq 1"
        for word, line in place.commands:
            lines.append(f"complete -c meshnode -n {_fish(where)} -a {_fish(word)} -d {_fish(line)}")
        for flag, line in place.flags:
            lines.append(
                f"complete -c meshnode -n {_fish(where)} -l {_fish(flag.removeprefix('--'))} -d {_fish(line)}"
            )
    return "\n".join(lines) + "\n"


def _fish(text: str) -> str:
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
