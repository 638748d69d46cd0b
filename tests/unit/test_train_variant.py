"""The variant that is trained on: part of a release, and never what is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.api.releases import check_servable
from meshnode.cli.main import main
from meshnode.core.errors import ModelError
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, RAW, cid_of
from protocols.manifest import codec
from protocols.manifest.codec import open_manifest, sign_manifest
from protocols.manifest.messages import FileRef, Manifest
from tests.manifests import KEY, manifest_of


def release(*variants: str) -> Manifest:
    """Its files are the smaller the later their variant is named."""

    def file(name: str) -> FileRef:
        size = 100 - 10 * next((k for k, v in enumerate(variants) if name.startswith(v)), 0)
        return FileRef(cid=cid_of(RAW, name.encode()), size=size)

    return manifest_of(file, layers=2, variants=variants)


def test_it_travels_with_the_release() -> None:
    manifest = release("int8", "int4", "train")
    assert open_manifest(sign_manifest(KEY, manifest)) == manifest
    assert manifest.servable == ["int8", "int4"]
    assert manifest.smallest_variant() == "int4"  # train is smaller
    assert len(manifest.files_of("train")) == 1 + 1 + 2 + 2  # tokenizer, names, layers, ends


def test_a_release_has_something_that_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = release("train")
    with pytest.raises(LocalProtocolError, match="train can't be served, and there is no other"):
        sign_manifest(KEY, alone)
    monkeypatch.setattr(codec, "TRAIN", "x")
    monkeypatch.setattr(Manifest, "servable", ["train"])
    block = sign_manifest(KEY, alone)  # somebody else's program
    monkeypatch.undo()
    with pytest.raises(RemoteProtocolError, match="train can't be served, and there is no other"):
        open_manifest(block)


def test_whoever_wants_to_serve_it_is_told_what_can_be() -> None:
    manifest = release("int4", "int8", "train")
    check_servable(manifest, "int8")
    with pytest.raises(ModelError, match=r"train of tiny is for training and can't be served; choose int4 or int8\."):
        check_servable(manifest, "train")
    with pytest.raises(ModelError, match="no variant fp32"):
        check_servable(manifest, "fp32")
    assert replace(manifest, variants={}).servable == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "example:smollm2",
            "the variant train can't be served; add it beside another: --variant int4 --variant train",
        ),
        (cid_of(DAG_CBOR, b"x"), "meshnode model pin NAME --variant train"),
    ],
)
def test_it_is_not_added_alone(source: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "add", source, "--variant", "train", "--data", str(tmp_path)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
