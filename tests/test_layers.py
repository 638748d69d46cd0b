"""Imports point one way. Each forbidden import carries the sentence that explains it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PURE = {
    "trio": "no I/O in a protocol or policy",
    "time": "time comes in as `now`",
    "random": "randomness comes in as an argument",
    "secrets": "randomness comes in as an argument",
    "os": "no environment, no urandom",
    "socket": "no I/O in a protocol or policy",
    "libp2p": "one adapter imports libp2p",
    "torch": "a serving node never imports torch",
    "onnxruntime": "only the engine process imports onnxruntime",
}
NO_ADAPTERS = {
    "libp2p": "one adapter imports libp2p",
    "torch": "a serving node never imports torch",
    "onnxruntime": "only the engine process imports onnxruntime",
    "meshnode.node": "the composition root imports us, not the other way round",
    "meshnode.cli": "the command line is on top",
    "meshnode.net.libp2p_host": "services see ports, node.py sees adapters",
    "meshnode.net.memory_host": "services see ports, node.py sees adapters",
    "meshnode.content.blob_store": "services see ports, node.py sees adapters",
    "meshnode.engine.process": "services see ports, node.py sees adapters",
    "meshnode.models": "publishing runs in a process of its own",
}
BAD: dict[str, dict[str, str]] = {
    "protocols": {**PURE, "meshnode": "a protocol does not know who runs it"},
    "meshnode/policy": {**PURE, "meshnode.services": "imports point down", "meshnode.net": "policy is pure"},
    "meshnode/core": {
        **NO_ADAPTERS,
        "meshnode.services": "imports point down",
        "meshnode.policy": "imports point down",
        "meshnode.net": "imports point down",
    },
    "meshnode/services": NO_ADAPTERS,
    "meshnode/net": {"torch": "a serving node never imports torch", "meshnode.services": "imports point down"},
    "meshnode/content": {"libp2p": "one adapter imports libp2p", "meshnode.services": "imports point down"},
    "meshnode/engine": {
        "libp2p": "one adapter imports libp2p",
        "torch": "a serving node never imports torch",
        "meshnode.services": "imports point down",
    },
    "meshnode/cli": {"torch": "commands must start fast", "libp2p": "commands must start fast"},
}


def imports(path: Path) -> set[str]:
    """Every dotted module name that a file imports, with all its parents."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in found:
            parts = name.split(".")
            names |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return names


@pytest.mark.parametrize("folder", BAD)
def test_layer(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file; has it moved?"
    broken = [
        f"{path.relative_to(ROOT)} imports {name}: {BAD[folder][name]}"
        for path in files
        for name in sorted(imports(path) & BAD[folder].keys())
    ]
    assert not broken, "\n".join(broken)


def test_services_do_not_know_each_other() -> None:
    broken = []
    for path in sorted((ROOT / "meshnode/services").glob("*.py")):
        others = {f"meshnode.services.{p.stem}" for p in path.parent.glob("*.py")} - {
            f"meshnode.services.{path.stem}"
        }
        broken += [f"{path.name} imports {name}" for name in sorted(imports(path) & others)]
    assert not broken, "\n".join(broken)


def test_only_the_adapter_imports_libp2p() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in ("protocols", "meshnode")
        for path in (ROOT / folder).rglob("*.py")
        if "libp2p" in imports(path)
    }
    assert users <= {"meshnode/net/libp2p_host.py", "meshnode/net/libp2p_guards.py"}


def test_only_the_codec_imports_cbor2() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in ("protocols", "meshnode")
        for path in (ROOT / folder).rglob("*.py")
        if "cbor2" in imports(path)
    }
    assert users <= {"protocols/codec.py", "protocols/manifest/codec.py"}


OUTSIDE = {"sqlite3", "socket", "ssl", "subprocess", "mmap", "libp2p", "onnxruntime", "onnx", "numpy", "torch"}


def test_services_see_adapters_through_their_ports() -> None:
    """Of the adapters' folders a service uses ports, and parts that touch nothing outside themselves."""
    broken = []
    for path in sorted((ROOT / "meshnode/services").glob("*.py")):
        for name in sorted(imports(path)):
            part = ROOT / (name.replace(".", "/") + ".py")
            if name.split(".")[1:2] in (["net"], ["content"], ["engine"], ["state"], ["models"]) and part.exists():
                touched = imports(part) & OUTSIDE
                broken += (
                    [f"{path.name} imports {name}, which imports {', '.join(sorted(touched))}"] if touched else []
                )
    assert not broken, "\n".join(broken)


def test_protocols_and_policy_run_without_heavy_libraries() -> None:
    """Imported in a fresh process, they load neither trio nor anything that computes or talks."""
    modules = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for folder in ("protocols", "meshnode/policy")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    heavy = ("trio", "libp2p", "torch", "onnxruntime", "onnx", "numpy", "structlog", "transformers", "scipy")
    program = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
