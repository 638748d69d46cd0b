"""Imports point one way. Each forbidden import carries the sentence that explains it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NO_TORCH = dict.fromkeys(("torch", "transformers", "meshnode.publisher"), "a serving node never imports torch")
NO_HEAVY = {
    **NO_TORCH,
    "libp2p": "one adapter imports libp2p",
    "onnxruntime": "only the engine process imports onnxruntime",
}
PURE = {
    **NO_HEAVY,
    "trio": "no I/O in a protocol or policy",
    "time": "time comes in as `now`",
    "random": "randomness comes in as an argument",
    "secrets": "randomness comes in as an argument",
    "os": "no environment, no urandom",
    "socket": "no I/O in a protocol or policy",
}
TOP = {
    f"meshnode.{name}": "imports point down"
    for name in ("node", "parts", "assemble", "api", "cli", "harness", "bench", "doctor", "client", "sim")
}
ADAPTERS = {
    f"meshnode.{name}": "services see ports, assemble.py sees adapters"
    for name in (
        "net.libp2p",
        "net.lane",
        "net.memory_host",
        "store.blob_store",
        "engine.process",
        "ipfs.rpc",
        "ipfs.gateway",
        "state.database",
        "state.memory_state",
        "state.samples",
        "state.budget",
        "text.process",
        "text.in_process",
        "text.tokenizer",
        "trainer.process",
    )
}


def others(*but: str) -> dict[str, str]:
    """The folders of adapters, which do not know each other."""
    folders = {"net", "store", "ipfs", "engine", "membership", "state", "text", "trainer"} - set(but)
    return {f"meshnode.{name}": "one adapter does not know another" for name in folders}


UP = {**TOP, "meshnode.services": "imports point down"}
HANDED_IN = "the state is handed in"
ON_TOP = {"meshnode.cli": "the command line is on top"}
LOW = {**UP, **NO_HEAVY}
# Every folder of the two packages: what it must not import, and why.
BAD: dict[str, dict[str, str]] = {
    "protocols": {**PURE, "meshnode": "a protocol does not know who runs it"},
    "meshnode/model": {**PURE, **UP, **others(), "meshnode.policy": "imports point down"},
    "meshnode/policy": {**PURE, **UP, **others()},
    "meshnode/core": {**LOW, **others(), "meshnode.policy": "imports point down"},
    "meshnode/config": {**LOW, **others()},
    "meshnode/net": {**UP, **NO_TORCH, **others("net")},
    "meshnode/store": {**LOW, **others("store")},
    "meshnode/ipfs": {
        **LOW,
        **others("ipfs", "store"),
        "meshnode.store.blob_store": "it uses the store's port",
    },
    "meshnode/engine": {**UP, **NO_TORCH, **others("engine"), "libp2p": "one adapter imports libp2p"},
    "meshnode/state": {**LOW, **others("state", "membership")},
    "meshnode/membership": {**LOW, **others("membership", "state", "net"), "meshnode.state.database": HANDED_IN},
    "meshnode/text": {**LOW, **others("text")},
    "meshnode/publisher": {**UP, "libp2p": "one adapter imports libp2p"},
    "meshnode/trainer": {
        **UP,
        **others("trainer"),
        "libp2p": "one adapter imports libp2p",
        "onnxruntime": "only the engine process imports onnxruntime",
        "meshnode.publisher.publish": "of the publisher it uses what reads a model, and publishes nothing",
    },
    "meshnode/services": {**TOP, **NO_HEAVY, **ADAPTERS},
    "meshnode/doctor": {**NO_HEAVY, **ON_TOP},
    "meshnode/upstream": {**LOW, **others()},
    "meshnode/system": {**NO_HEAVY, **ADAPTERS, **ON_TOP},
    "meshnode/api": {**NO_HEAVY, **ADAPTERS, **ON_TOP},
    "meshnode/http": {**NO_HEAVY, **ADAPTERS, **ON_TOP},
    "meshnode/harness": {**ON_TOP, "torch": "publishing runs in a process of its own"},
    "meshnode/sim": {**NO_HEAVY, **ON_TOP},
    "meshnode/bench": ON_TOP,
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


def test_every_folder_has_its_rule() -> None:
    folders = {f"meshnode/{path.parent.name}" for path in (ROOT / "meshnode").glob("*/__init__.py")}
    assert folders <= BAD.keys()


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


SERVICES = ROOT / "meshnode/services"


def test_services_do_not_know_each_other() -> None:
    """A service is a file, or a folder whose files know each other. What they see of each other is in port.py."""
    broken = []
    for path in sorted(SERVICES.rglob("*.py")):
        own = path.relative_to(SERVICES).parts[0].removesuffix(".py")
        others = {f"meshnode.services.{p.stem}" for p in SERVICES.iterdir()} - {
            f"meshnode.services.{own}",
            "meshnode.services.port",
        }
        broken += [f"{path.relative_to(SERVICES)} imports {name}" for name in sorted(imports(path) & others)]
    assert not broken, "\n".join(broken)


def test_only_the_adapter_imports_libp2p() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in ("protocols", "meshnode")
        for path in (ROOT / folder).rglob("*.py")
        if "libp2p" in imports(path)
    }
    assert users <= {
        "meshnode/net/libp2p/host.py",
        "meshnode/net/libp2p/gossip.py",
        "meshnode/net/libp2p/replacements.py",
        "meshnode/net/libp2p/dialler.py",
    }


def test_onnxruntime_is_imported_where_its_telemetry_is_off() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in ("protocols", "meshnode", "tests", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if "onnxruntime" in imports(path)
    }
    assert users == {"meshnode/engine/runtime.py"}
    program = "import os; from meshnode.engine.runtime import ort; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    program += "; print(len(os.listdir('/proc/self/task')) if os.path.exists('/proc/self/task') else 1)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.stdout.split() == ["1", "1"], result.stderr


def test_only_the_http_door_imports_a_web_server() -> None:
    """A node without HTTP does not load it: `embed.py` imports the door when the owner wants it."""
    users = {
        path.relative_to(ROOT / "meshnode").parts[0]
        for path in (ROOT / "meshnode").rglob("*.py")
        if {"starlette", "hypercorn", "h11", "prometheus_client"} & imports(path)
    }
    assert users == {"http"}


def test_only_the_tracer_imports_opentelemetry() -> None:
    """It is an extra, and `assemble.py` imports the tracer when the owner has set a collector."""
    users = {
        str(path.relative_to(ROOT))
        for folder in ("protocols", "meshnode")
        for path in (ROOT / folder).rglob("*.py")
        if "opentelemetry" in imports(path)
    }
    assert users == {"meshnode/otlp.py"}


def test_only_the_codecs_import_cbor2() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in ("protocols", "meshnode")
        for path in (ROOT / folder).rglob("*.py")
        if "cbor2" in imports(path)
    }
    assert users <= {"protocols/codec.py", "protocols/dag_cbor.py"}


def test_samples_do_not_reach_what_talks_to_others() -> None:
    """Protocols and the network's adapters know no samples; of the services, the one that keeps them does, and those
    that hand them to the trainer, a process on this device."""
    rooms = ("protocols", "meshnode/net", "meshnode/ipfs", "meshnode/store", "meshnode/services")
    users = {
        str(path.relative_to(ROOT))
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
        if any(name.startswith("meshnode.state.sample") for name in imports(path))
    }
    learning = {f"meshnode/services/learning/{name}.py" for name in ("service", "worker")}
    assert users == {"meshnode/services/samples.py", *learning}


OUTSIDE = {"sqlite3", "socket", "ssl", "subprocess", "mmap", "libp2p", "onnxruntime", "onnx", "numpy", "torch"}


def test_services_see_adapters_through_their_ports() -> None:
    """Of the adapters' folders a service uses ports, and parts that touch nothing outside themselves."""
    broken = []
    for path in sorted(SERVICES.rglob("*.py")):
        for name in sorted(imports(path)):
            part = ROOT / (name.replace(".", "/") + ".py")
            if (
                name.split(".")[1:2] in (["net"], ["store"], ["ipfs"], ["engine"], ["state"], ["membership"])
                and part.exists()
            ):
                touched = imports(part) & OUTSIDE
                broken += (
                    [f"{path.name} imports {name}, which imports {', '.join(sorted(touched))}"] if touched else []
                )
    assert not broken, "\n".join(broken)


# Adapters are vectors: these compute with them, and nothing else here needs numpy.
VECTORS = {
    "protocols.delta.frame",
    "protocols.delta.layouts",
    "protocols.delta.codec",
    "protocols.delta.checks",
    "protocols.cohort.events",
    "protocols.cohort.machine",
    "protocols.cohort.masking",
    "meshnode.policy.mixing",
    "meshnode.policy.robust",
}


def test_protocols_and_policy_run_without_heavy_libraries() -> None:
    """Imported in a fresh process, they load neither trio nor anything that computes or talks."""
    modules = [
        name
        for folder in ("protocols", "meshnode/policy")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (name := str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"))
        not in VECTORS
    ]
    heavy = ("trio", "libp2p", "torch", "onnxruntime", "onnx", "numpy", "structlog", "transformers", "scipy")
    program = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


TRAINER_CHILD = {"base", "texts", "hidden", "adapted", "gradient", "optimiser", "private", "checkpoint", "training"}
TRAINER_CHILD |= {"evaluation", "local", "workshop"}


def test_a_node_imports_no_torch_to_have_a_trainer() -> None:
    """Torch is in the trainer's process alone: what the node has of it is imported in a fresh process."""
    nodes = ["meshnode.sim.trainer", *(f"meshnode.trainer.{name}" for name in ("port", "process", "wire", "child"))]
    heavy = ("torch", "transformers", "peft", "safetensors", "tokenizers", "onnxruntime")
    program = (
        f"import importlib, sys\nfor name in {nodes!r}:\n    importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
    users = {
        path.stem
        for path in (ROOT / "meshnode/trainer").glob("*.py")
        if {"torch", "transformers", "peft", "safetensors", "tokenizers"} & imports(path)
    }
    assert users <= TRAINER_CHILD | {"child"}  # child.py imports torch when there is a job
