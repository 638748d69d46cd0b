"""The two benches of learning give their tables, in a small form."""

from __future__ import annotations

from meshnode.bench import averaging, robust
from meshnode.sim.attacks import PLANS


def test_exchanges_beside_other_topologies() -> None:
    found = averaging.consensus(25, 0)
    assert found["ours (exact)"] == 9
    assert found["ring"] > 100
    assert averaging.consensus(16, 0)["one-peer exponential"] == 4


def test_modes_and_codecs() -> None:
    result = {
        "exchanges": {"16": averaging.consensus(16, 0)},
        "modes": [averaging.modes(2, 3, 0)],
        "factors": {"both": {"pairs, one mix": 0.1, "group": 0.1}},
        "codecs": averaging.codecs(1),
    }
    text = averaging.table(result)
    by = result["modes"][0]
    assert by["federated averaging"]["bytes_a_round_and_node"] > 3.8 * by["pairs, one mix"]["bytes_a_round_and_node"]
    assert all(name in text for name in (*averaging.MODES, "ours (exact)", "sparse"))


def test_rules_against_attacks() -> None:
    said: list[str] = []
    result = robust.measure([0], 1, 7, said.append)
    assert len(said) == len(result["accuracy"]) == len(robust.OURS) + len(robust.OTHERS)
    assert all(set(by) == {"none", *PLANS} for by in result["accuracy"].values())
    assert result["points_lost"]["cap + CS+ + gate"]["none"] == [0.0]
    text = robust.table(result)
    assert all(name in text for name in (*robust.OURS, *robust.OTHERS, *PLANS))
