"""The choice of samples, whatever there is to choose from."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from meshnode.policy.selection import Candidate, choose

candidates = st.lists(
    st.builds(
        Candidate,
        id=st.integers(1, 10_000),
        group=st.sampled_from([b"a", b"b", b"c"]),
        missed=st.none() | st.booleans(),
        loss=st.none() | st.floats(0, 50),
        used=st.integers(0, 5),
    ),
    max_size=60,
    unique_by=lambda candidate: candidate.id,
)


@given(candidates, st.integers(0, 70), st.integers(0, 1 << 32))
def test_a_choice(there: list[Candidate], count: int, seed: int) -> None:
    chosen = choose(there, count, random.Random(seed))
    assert len(set(chosen)) == len(chosen) == min(count, len(there))
    assert chosen == choose(there[::-1], count, random.Random(seed)), "in whatever order they come"
    by_id = {candidate.id: candidate for candidate in there}
    taken = Counter(by_id[id_].group for id_ in chosen)
    whole = Counter(candidate.group for candidate in there)
    for group, most in whole.items():
        if taken[group] < most:
            assert taken[group] >= max(taken.values(), default=0) - 1, "a class that has more gets as many as any"
            left = [c for c in there if c.group == group and c.id not in chosen]
            mine = [by_id[id_] for id_ in chosen if by_id[id_].group == group]
            if any(c.missed for c in left):
                assert all(c.missed for c in mine), "what is mispredicted goes first"
