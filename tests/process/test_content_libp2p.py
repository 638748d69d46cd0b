"""Good, slow, corrupt and killed providers in processes of their own, over the real libp2p and direct lanes.

The benchmark's cases, small; what a fetch does in each of them is told in tests/services/test_content.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.bench import content as bench
from meshnode.bench.provider import host_from
from meshnode.core.errors import ConfigError

pytestmark = [pytest.mark.net, pytest.mark.process]


@pytest.mark.long
def test_the_benchmark_measures(tmp_path: Path) -> None:
    result = bench.measure(60, 1, tmp_path, settle_s=0.0)
    assert [row["case"] for row in result["rounds"]] == ["one", "three", "trouble", "killed"]
    assert [row["killed"] for row in result["rounds"]] == [False, False, False, True]
    for case in result["cases"].values():
        assert case["right"] and case["mb_s"] > 0 and case["wasted_mb"] < 8
    speed = {"one: ", "trouble: "}  # what depends on the machine that the test happens to run on
    assert [words for words in bench.misses(result) if not any(words.startswith(case) for case in speed)] == []
    assert result["cases"]["trouble"]["dropped"] == ["corrupt"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_host_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="--host nowhere:x"):
        host_from("nowhere:x")
