"""Nonsense on the command line: one sentence, an exit code, no traceback. Most of it in this very process."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from meshnode.cli.main import main
from meshnode.core.errors import EXIT_CODES
from meshnode.core.paths import Paths
from tests.process.mesh_rig import Ran, meshnode

pytestmark = [pytest.mark.net, pytest.mark.process]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders to point at; `node` is the data folder of a member of a network that does not run."""
    folder = tmp_path_factory.mktemp("nonsense")
    (folder / "file").write_text("a file")
    (folder / "empty").mkdir()
    (folder / "latin1").write_bytes("Öl".encode("latin-1"))
    (folder / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5) + b"\0" * 10)
    name = b"general.architecture"
    value = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, 8) + b"nonsense"
    (folder / "odd.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + b"\0" * 64)
    (folder / "empty.gguf").touch()
    (folder / "noise.gguf").write_bytes(random.Random(1).randbytes(4096))
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps({"architectures": ["Nonsense"], "model_type": "nonsense"}))
    for config, text in {
        "unknown": "[serve]\nlayer = 3\n",
        "invalid": "[serve\n",
        "typed": "[serve]\nlayers = 'x'\n",
    }.items():
        Paths(folder / config).create()
        Paths(folder / config).config.write_text(text)
    assert main(["init", "--listen", "/ip4/127.0.0.1/tcp/1", "--data", str(folder / "node")]) == 0
    return folder


COMMANDS = {
    "an unknown command": "dance",
    "an unknown flag": "start --dance",
    "a flag without its value": "start --memory",
    "a memory that is no size": "start --memory banana",
    "a negative memory": "start --memory=-1",
    "negative layers": "start --layers -1",
    "an address that is none": "start --listen nonsense",
    "a port that is none": "start --listen /ip4/127.0.0.1/tcp/99999",
    "a bootstrap peer that is none": "start --bootstrap-peer /ip4/1.2.3.4/tcp/1",
    "an unknown engine": "start --engine quantum",
    "a folder that is a file": "start --data {place}/file",
    "a folder inside a file": "start --data {place}/file/data",
    "a folder that nobody can write": "start --data /proc/meshnode",
    "an init that nobody can write": "init --data /proc/meshnode",
    "an unknown key": "start --data {place}/unknown",
    "a configuration that is no TOML": "start --data {place}/invalid",
    "a setting of the wrong type": "config --data {place}/typed",
    "no membership": "start --data {place}/empty",
    "a network twice": "init --data {place}/node",
    "an invite without a network": "invite --data {place}/empty",
    "an invite for a negative time": "invite --hours -1 --data {place}/node",
    "an invite for nan hours": "invite --hours nan --data {place}/node",
    "an invite for ever and ever": "invite --hours inf --data {place}/node",
    "an invite for everybody": "invite --uses 99999999999999999999 --data {place}/node",
    "a join without a ticket": "join",
    "a ticket that is no text": "join \udcff",
    "a ticket that is none": "join " + "a" * 100_000,
    "status without a node": "status --data {place}/node",
    "status in JSON without a node": "status --json --data {place}/node",
    "stop without a node": "stop --data {place}/node",
    "generate without a node": "generate hello --data {place}/node",
    "chat without a node": "chat --data {place}/node",
    "generate without a prompt": "generate --data {place}/node",
    "a prompt and a prompt file": "generate hello --prompt-file {place}/file",
    "a prompt file that is not there": "generate --prompt-file {place}/nowhere",
    "a prompt file that is no UTF-8": "generate --prompt-file {place}/latin1",
    "a prompt file that is a folder": "generate --prompt-file {place}/empty",
    "a model that is not there": "model add {place}/nowhere --data {place}/node",
    "a model that is an empty folder": "model add {place}/empty --data {place}/node",
    "a GGUF that is cut off": "model add {place}/cut.gguf --data {place}/node",
    "a GGUF of an unknown architecture": "model add {place}/odd.gguf --data {place}/node",
    "a GGUF of nothing": "model add {place}/empty.gguf --data {place}/node",
    "a GGUF of noise": "model add {place}/noise.gguf --data {place}/node",
    "a checkpoint of an unknown architecture": "model add {place}/hf --data {place}/node",
    "an unknown example": "model add example:nothing --data {place}/node",
    "an unknown model to show": "model show nothing --data {place}/node",
    "an unknown model to verify": "model verify nothing --data {place}/node",
    "an unknown model to remove": "model remove nothing --data {place}/node",
    "an unknown model to serve": "model serve nothing --data {place}/node",
    "an unknown model to export": "model export nothing --car {place}/x.car --data {place}/node",
    "an export to nowhere": "model export nothing --data {place}/node",
    "an import of nothing": "model import {place}/nowhere.car --data {place}/node",
    "an import of a folder": "model import {place}/empty --data {place}/node",
    "an import of noise": "model import {place}/noise.gguf --data {place}/node",
    "a harness without a mesh": "harness kill node1 --dir {place}/empty",
    "a harness in a file": "harness up --nodes 1 --dir {place}/file",
    "a harness of no nodes": "harness up --nodes 0 --dir {place}/mesh",
    "a harness of very many nodes": "harness up --nodes 1000000 --dir {place}/mesh",
    "a harness with two sizes for three": "harness up --nodes 3 --memory 1MB,2MB --dir {place}/mesh",
    "a harness with nonsense for memory": "harness up --nodes 1 --memory banana --dir {place}/mesh",
    "a harness that waits for nan": "harness up --nodes one --dir {place}/mesh",
}


@pytest.fixture(autouse=True)
def nobody(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --data: a folder that is not there."""
    monkeypatch.setenv("MESHNODE_DATA", str(place / "nobody"))


@pytest.mark.parametrize("what", COMMANDS)
def test_nonsense(what: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [word.format(place=place) for word in COMMANDS[what].split()]
    try:
        code = main(words)
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    said = Ran(code, *capfd.readouterr())
    sentence = said.sentence()
    assert len(sentence) > 20
    assert "Errno" not in sentence and "mmap" not in sentence
    assert said.code in EXIT_CODES


@pytest.mark.parametrize("words", [["start", "--memory", "nonsense"], ["generate", "hello", "--temperature", "99"]])
def test_the_same_kind_of_mistake_has_the_same_code(words: list[str]) -> None:
    """As real processes: what `main` returns is what the shell sees."""
    ran = meshnode(*words)
    assert words[-1] in ran.sentence()
    assert ran.code == 2
