"""What shells complete. Each shell that is installed is asked itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from meshnode.cli.completion import bash, fish, tree, zsh
from meshnode.cli.main import COMMANDS, main

TREE = tree()
LINES = {
    ("st",): {"start", "stop", "status"},
    ("model", "--data", "x", "ad"): {"add"},
    ("model", "add", "--serv"): {"--serve"},
    ("completion", ""): {"bash", "zsh", "fish", "--help"},
}
# What each shell says about a line whose last word is being written.
BASH = 'source "$0"; COMP_WORDS=(meshnode "$@"); COMP_CWORD=$#; _meshnode; printf "%s\\n" "${COMPREPLY[@]}"'
FISH = 'source $argv[1]; complete -C "meshnode $argv[2..]"'


def needs(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"needs {shell}")
    return found


def said(command: list[str]) -> set[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return {line.split("\t")[0] for line in done.stdout.split("\n") if line}


def test_every_command_is_there_with_its_flags() -> None:
    assert {name for name, _, _ in COMMANDS} == {at[0] for at in TREE if len(at) == 1}
    assert "--json" in TREE["status",].words.split()
    assert "--serve" in TREE["model", "add"].words.split()


def test_bash(tmp_path: Path) -> None:
    shell = needs("bash")
    file = tmp_path / "completion.bash"
    file.write_text(bash(TREE))
    for words, wanted in LINES.items():
        assert said([shell, "--norc", "-c", BASH, str(file), *words]) == wanted


def test_zsh(tmp_path: Path) -> None:
    """Its own way to complete needs a terminal; that it reads the file without a complaint does not."""
    shell = needs("zsh")
    file = tmp_path / "completion.zsh"
    file.write_text(zsh(TREE).replace("compinit && compinit", f"compinit && compinit -u -d {tmp_path}/dump", 1))
    assert said([shell, "-f", "-c", 'source "$0"; print $_comps[meshnode]', str(file)]) == {
        "_bash_complete -o default -F _meshnode"
    }


def test_fish(tmp_path: Path) -> None:
    shell = needs("fish")
    file = tmp_path / "completion.fish"
    file.write_text(fish(TREE))
    for words, wanted in LINES.items():
        found = said([shell, "--no-config", "-c", FISH, str(file), *words])
        assert wanted - {"--help"} <= found, (words, found)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == bash(TREE)
