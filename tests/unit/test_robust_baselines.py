"""The rules that ours is compared with are those of others: their own programs gave these results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.sim.baselines import RULES, apply

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "robust_reference.json").read_text())


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: f"{len(case['vectors'])} vectors")
def test_the_results_are_those_of_byzpy_and_krum(case: dict[str, Any]) -> None:
    vectors = np.array(case["vectors"])
    checked = set()
    for source, results in case["expected"].items():
        for name, expected in results.items():
            assert RULES[name](vectors, case["hostile"]) == pytest.approx(expected, abs=1e-8), (source, name)
            checked.add(name)
    assert checked == {"trimmed mean", "krum", "geometric median", "nearest neighbours"}


def test_clipped_gossip_by_hand() -> None:
    """Ours at 0, three neighbours at 1, 2 and 90, one of them hostile: clipped to the second distance."""
    vectors = np.array([[0.0], [1.0], [-2.0], [90.0]])
    assert RULES["clipped gossip"](vectors, 1).tolist() == [(1 - 2 + 2) / 4]
    assert RULES["mean"](vectors, 1).tolist() == [89 / 4]


def test_rules_go_by_their_names() -> None:
    own, others = np.zeros(2, np.float32), [np.ones(2, np.float32)] * 3
    assert apply("mean", own, others, 1).dtype == np.float32
    assert all(apply(name, own, others, 1).shape == (2,) for name in RULES)
