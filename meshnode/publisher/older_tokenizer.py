"""Tokenizers of older formats (tokenizer.model, vocab.json): transformers makes a tokenizer.json of them.

In a process with limits on time and memory, since the files are foreign and the libraries that read them panic:

    python -m meshnode.publisher.older_tokenizer FOLDER

writes tokenizer.json to standard output, or a sentence to standard error and ends with 4.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from meshnode.core.children import signal_name
from meshnode.core.confinement.environment import child_environment
from meshnode.core.errors import ModelError
from meshnode.publisher.words import first_line
from meshnode.text.limits import for_good, limit_computing, limit_memory

CPU_S: Final = 300
MEMORY_BYTES: Final = 4 << 30


def converted(folder: Path) -> str:
    """tokenizer.json of a folder that has an older format. Blocking. Raises ModelError."""
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "meshnode.publisher.older_tokenizer", str(folder.resolve())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env=child_environment(os.environ) | {"HF_HUB_OFFLINE": "1"},
    )
    if ran.returncode == 0:
        return ran.stdout.decode()
    if ran.returncode == -signal.SIGXCPU:
        why = f"it takes more than {CPU_S} s of computing"
    elif ran.returncode < 0:
        why = (
            f"it wants more than {MEMORY_BYTES >> 20} MiB of memory, or fails badly ({signal_name(-ran.returncode)})"
        )
    else:
        said = ran.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else "its process ended without a word"
    raise ModelError(f"The tokenizer in {folder} can't be converted to tokenizer.json: {why}.")


def main(folder: str) -> int:
    """In the process."""
    import transformers

    limit_memory(MEMORY_BYTES)
    limit_computing(CPU_S)
    for_good()
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True)
        made = str(loaded.backend_tokenizer.to_str())
    except BaseException as error:  # noqa: BLE001 - libraries raise whatever they like, and panic
        sys.stderr.write(f"\n{first_line(error)}\n")
        return ModelError.exit_code
    sys.stdout.buffer.write(made.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
