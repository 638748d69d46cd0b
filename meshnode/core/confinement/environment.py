"""What a child process that works on foreign input gets of its parent's environment: next to nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import meshnode

# where libraries and this package are found, and how text is read; nothing that can hold a secret
_KEPT: Final = (
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "PYTHONHOME",
    "PYTHONDONTWRITEBYTECODE",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TMPDIR",
)
# One thread while it starts: what a process gives up it gives up for the calling thread alone.
_FIXED: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for `python -P -m meshnode.…` as a confined child."""
    kept = {name: environ[name] for name in _KEPT if name in environ}
    root = Path(meshnode.__file__).parent.parent
    others = [Path(part).absolute() for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**kept, **_FIXED, "PYTHONPATH": os.pathsep.join(map(str, (root, *others)))}  # it leaves its folder
