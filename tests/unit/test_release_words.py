"""What `meshnode release` and `meshnode status` say of adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.api.messages import ReleaseStatus, Status
from meshnode.cli.main import main
from meshnode.cli.release import described, found, listed
from meshnode.cli.status import describe
from meshnode.core.errors import ConfigError, NotRunning

ONE = ReleaseStatus(
    version="v1.0.0-1",
    adapter="bafyreione",
    candidate="bafkreione",
    phase="released",
    why="every node may use it",
    share_percent=100.0,
    in_use=True,
    votes=3,
    in_favour=3,
    voters=4,
    median=-0.0213,
    right=19,
    wrong=1,
)
TWO = replace(
    ONE,
    version="v1.0.0-2",
    adapter="bafyreitwo",
    candidate="bafkreitwo",
    phase="rolling",
    share_percent=25.0,
    in_use=False,
    why="3 of 4 voters have voted",
    previous="bafyreione",
)


def test_a_line_says_how_far_it_has_come_and_why() -> None:
    assert listed(()) == "No adapter has been proposed yet, so the model alone answers."
    two, one = listed((TWO, ONE)).splitlines()
    assert two == "v1.0.0-2    rolling 25 %    3 of 4 voters have voted"
    assert one == "v1.0.0-1    released        every node may use it (in use)"


def test_all_of_one() -> None:
    text = described(TWO)
    assert "replaces  bafyreione" in text
    assert "3 of 4 voters, 3 in favour, median change in loss -0.0213" in text
    assert "19 answers with it were right, 1 wrong" in text
    assert "replaces  the model alone" in described(ONE)


def test_one_is_found_by_version_or_cid() -> None:
    both = (TWO, ONE)
    assert found(both, "") == ONE and found(both, "v1.0.0-2") == TWO and found(both, "bafyreitwo") == TWO
    with pytest.raises(ConfigError, match=r"no release 'v9' here; there are: v1.0.0-2, v1.0.0-1"):
        found(both, "v9")
    with pytest.raises(ConfigError, match="the model alone answers"):
        found((TWO,), "")
    with pytest.raises(ConfigError, match=r"Several releases are called v1.0.0-1.*bafyreione, bafyreitwo"):
        found((ONE, replace(TWO, version="v1.0.0-1")), "v1.0.0-1")


def test_the_status_has_what_is_in_use_or_under_way() -> None:
    text = describe(Status(releases=(TWO, ONE, replace(TWO, version="v1.0.0-0", phase="revoked"))))
    assert "adapter v1.0.0-2" in text and "adapter v1.0.0-1" in text and "v1.0.0-0" not in text


def test_the_list_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for words in (["release"], ["release", "list"]):
        assert main([*words, "--data", str(tmp_path)]) == NotRunning.exit_code
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and "There is no node" in said[0]


def test_json_and_back() -> None:
    assert Status.read(Status(releases=(TWO, ONE)).as_json()).releases == (TWO, ONE)
