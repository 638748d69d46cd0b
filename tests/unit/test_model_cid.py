"""The source of `meshnode model add`: a CID, something that was meant as one, or a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.cli.model_cid import manifest_cid
from meshnode.core.errors import ModelError
from protocols.ids import DAG_CBOR, RAW, base58_encode, cid_of, cid_to_bytes

CID = cid_of(DAG_CBOR, b"a manifest")
FILE = cid_of(RAW, b"a file")
OLD = base58_encode(cid_to_bytes(FILE)[2:])


@pytest.mark.parametrize("source", [CID, f"ipfs://{CID}", f"/ipfs/{CID}"])
def test_the_cid_of_a_manifest(source: str) -> None:
    assert manifest_cid(source) == CID


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (FILE, "is the CID of a file;"),
        (OLD, "is the CID of a file (CIDv0); a model is added by the CID of its manifest, which begins with bafyrei"),
        (f"ipfs://{OLD}", "(CIDv0)"),
        (OLD[:-4], "looks like a CID but is not a valid one: "),
        (CID[:-1] + "9", "looks like a CID but is not a valid one: "),
        (CID[:-1] + "t", "looks like a CID but is not a valid one: "),
        (CID[:30], "looks like a CID but is not a valid one: "),
        (CID + "a", "looks like a CID but is not a valid one: "),
        (CID.upper(), f"write it in lower-case letters, {CID}."),
        ("ipfs://nonsense", "looks like a CID but is not a valid one: "),
    ],
)
def test_what_is_meant_as_one(source: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        manifest_cid(source)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "source", ["example:smollm2", "bafflegab", "./model", "/somewhere/model", "Qmodel", "x" * 5000, ""]
)
def test_paths_and_packages(source: str) -> None:
    assert manifest_cid(source) is None


@pytest.mark.parametrize("name", [CID, OLD, CID[:30], CID.upper()])
def test_a_folder_of_that_name_is_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert manifest_cid(name) is None
