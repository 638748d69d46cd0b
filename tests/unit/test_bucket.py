"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocols.bucket import MAX_KEYS, Bucket, Buckets


@given(gaps=st.lists(st.floats(0, 5), max_size=200), per_s=st.floats(0.5, 20), burst=st.integers(1, 30))
def test_no_more_than_the_burst_and_the_rate(gaps: list[float], per_s: float, burst: int) -> None:
    bucket, now, taken = Bucket(per_s, burst, 0.0), 0.0, 0
    for gap in gaps:
        now += gap
        taken += bucket.take(now)
        assert taken <= burst + now * per_s + 1e-6


def test_what_is_waited_for_may_be_taken() -> None:
    bucket, now = Bucket(2.0, 1, 0.0), 0.0
    for _ in range(10):
        now += bucket.wait_s(now)
        assert bucket.take(now)
    assert now == 4.5


def test_a_clock_that_stands_still_gives_nothing() -> None:
    bucket = Bucket(1.0, 3, 5.0)
    assert [bucket.take(now) for now in (5.0, 5.0, 4.0, 4.5)] == [True, True, True, False]


def test_keys_do_not_share_and_are_bounded() -> None:
    buckets = Buckets(1.0, 1)
    assert buckets.take("a", 0.0)
    assert not buckets.take("a", 0.0)
    assert all(buckets.take(number, 0.0) for number in range(MAX_KEYS))
    assert buckets.take("a", 0.0), "forgotten: as if it had never asked"


def test_who_spends_more_waits_for_it_and_no_longer_than_he_must() -> None:
    bucket = Bucket(2.0, 10, 0.0)
    assert [bucket.spend(5, 0.0, 60.0) for _ in range(4)] == [0.0, 0.0, 2.5, 5.0]
    assert bucket.spend(0, 5.0, 60.0) == 0.0
    assert bucket.spend(1000, 5.0, 3.0) == 3.0, "the rest is forgiven"
    assert bucket.spend(0, 8.0, 3.0) == 0.0


@given(costs=st.lists(st.floats(0, 20), max_size=100), per_s=st.floats(0.5, 20), burst=st.integers(1, 30))
def test_who_waits_as_long_as_he_is_told_keeps_the_rate(costs: list[float], per_s: float, burst: int) -> None:
    bucket, now = Bucket(per_s, burst, 0.0), 0.0
    for number in range(len(costs)):
        now += bucket.spend(costs[number], now, 1e6)
        assert sum(costs[: number + 1]) <= burst + now * per_s + 1e-6


def test_an_empty_bucket_is_known_without_taking() -> None:
    buckets = Buckets(1.0, 1)
    assert not buckets.is_empty("a", 0.0)
    assert buckets.take("a", 0.0)
    assert buckets.is_empty("a", 0.5)
    assert not buckets.is_empty("a", 1.0)
    assert buckets.take("a", 1.0)
