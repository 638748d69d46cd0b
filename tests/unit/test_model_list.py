"""What `meshnode model` says about models that are here, served, or only known, and to whom; no node runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.cli.main import main
from meshnode.core.clock import wall_ms
from meshnode.core.paths import Paths
from meshnode.membership.enrolment import init_network
from meshnode.publisher import release
from meshnode.state import releases
from meshnode.state.database import Database
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, RAW, Cid, cid_of
from protocols.manifest.messages import FileRef
from tests.manifests import block_of, manifest_of
from tests.unit.test_model_keep import QUOTA, published
from tests.unit.test_rotation import member


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    folder = tmp_path / "owner"
    init_network(folder, "home", node_name="owner")
    return folder


@pytest.fixture
def guest(owner: Path, tmp_path: Path) -> Path:
    """It may hold layers, and may not say which model the network serves."""
    return member(owner, tmp_path / "guest", "guest", wall_ms, roles=("serve",))  # type: ignore[arg-type]


def known_by_name(folder: Path) -> Cid:
    """The manifest of a model is here, none of its files."""
    manifest = manifest_of(lambda name: FileRef(cid=cid_of(RAW, name.encode()), size=1_000_000), layers=4)
    store = BlobStore(Paths(folder).content, QUOTA)
    cid = store.put_block(block_of(manifest), DAG_CBOR)
    store.close()
    return cid


def test_the_served_model_is_marked(owner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(owner, "v1.0.0-0", b"head")
    cid, _ = published(owner, "v2.0.0-0", b"another head")
    with Database(Paths(owner).state) as state:
        releases.set_served(state, "somebody", cid, "int4")
    assert main(["model", "list", "--data", str(owner)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "served" not in first and "served last in int4" in second


def test_files_that_are_missing_are_not_said_to_be_here(owner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cid = known_by_name(owner)
    with Database(Paths(owner).state) as state:
        releases.set_served(state, "somebody", cid_of(DAG_CBOR, b"another"), "int4")
    assert main(["model", "add", cid, "--data", str(owner)]) == 0
    said = capsys.readouterr().out
    assert "is on this node" not in said
    assert "8 MB of its files are not here yet" in said and "meshnode model pin tiny" in said


def test_who_may_not_publish_is_told_before_the_work(
    guest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        pytest.fail("the long work has begun")

    monkeypatch.setattr(release, "run_publisher", work)
    published(guest, "v1.0.0-0", b"head")
    for words in (
        ["model", "add", str(guest)],
        ["model", "serve", "tiny"],
        ["model", "import", "tiny.car", "--serve"],
        ["model", "add", known_by_name(guest), "--serve"],
    ):
        assert main([*words, "--data", str(guest)]) == 3
        assert "lacks the role publish" in capsys.readouterr().err


def test_nobody_is_advised_to_do_what_is_refused(guest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cid = known_by_name(guest)
    assert main(["model", "add", cid, "--data", str(guest)]) == 0
    said = capsys.readouterr().out
    assert "meshnode model serve" not in said
    assert "needs a node with the role publish" in said and f"meshnode model add {cid} --serve" in said
    with Database(Paths(guest).state) as state:
        assert releases.waiting(state) is None
