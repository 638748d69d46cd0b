"""The runner of every protocols/*/vectors.json: [{name, message, hex, verdict}].

`message` is the message as JSON (bytes in hex) and null where the bytes are refused; `verdict` is "accept" or
"reject". A test gives the cases; `hold` compares them with the file and both with the code. With
WRITE_VECTORS=1 the files are written instead: look at the difference before committing, a changed vector is
a changed protocol.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protocols.errors import RemoteProtocolError
from tests.wire import plain

PROTOCOLS = Path(__file__).resolve().parent.parent / "protocols"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    data: bytes
    message: object = None  # None: the bytes must be refused


def hold(protocol: str, cases: Sequence[Case], decode: Callable[[bytes], Any]) -> None:
    """Check the vectors of one protocol folder against its code."""
    path = PROTOCOLS / protocol / "vectors.json"
    entries = [
        {
            "name": case.name,
            "message": plain(case.message),
            "hex": case.data.hex(),
            "verdict": "reject" if case.message is None else "accept",
        }
        for case in cases
    ]
    assert len({case.name for case in cases}) == len(cases), "two vectors have the same name"
    if os.environ.get("WRITE_VECTORS"):
        path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    assert json.loads(path.read_text()) == entries, f"{path} differs from the code; see tests/vectors.py"
    for entry in json.loads(path.read_text()):
        data = bytes.fromhex(entry["hex"])
        if entry["verdict"] == "accept":
            assert plain(decode(data)) == entry["message"], entry["name"]
        else:
            with pytest.raises(RemoteProtocolError):
                decode(data)
