"""Any plain data and any message go through the codec unharmed; anything else is refused."""

from __future__ import annotations

from typing import Any

import cbor2
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocols.codec import MAX_DEPTH, dumps, loads
from protocols.errors import RemoteProtocolError
from tests.wire import damaged

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=30) | texts
items = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.integers(0, 2**64 - 1), inner, max_size=4)
        | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=12,
)


def depth(item: Any) -> int:
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
    return 0 if inner is None else 1 + max((depth(i) for i in inner), default=0)


def turned(item: Any) -> Any:
    """The same data with every map filled in the opposite order."""
    if isinstance(item, dict):
        return {key: turned(item[key]) for key in reversed(item)}
    return [turned(i) for i in item] if isinstance(item, list) else item


@settings(max_examples=300)
@given(items.filter(lambda item: depth(item) <= MAX_DEPTH))
def test_plain_data_comes_back_and_has_one_encoding(item: Any) -> None:
    data = dumps(item)
    assert loads(data) == item
    assert dumps(turned(item)) == data
    assert cbor2.loads(data) == item


@settings(max_examples=500)
@given(st.binary(max_size=60))
@example(b"\xa1\x00\x80")
def test_random_bytes_are_refused_or_canonical(data: bytes) -> None:
    try:
        item = loads(data)
    except RemoteProtocolError:
        return
    assert cbor2.dumps(item, canonical=True) == data  # the reference implementation agrees


@settings(max_examples=60)
@given(items.filter(lambda item: depth(item) <= MAX_DEPTH))
def test_damage_to_plain_data_is_refused_or_canonical(item: Any) -> None:
    for data in damaged(dumps(item)[:60]):
        try:
            again = dumps(loads(data))
        except RemoteProtocolError:
            continue
        assert again == data or (
            # The reference sorts maps that mix numbers and texts otherwise; messages have numbers alone.
            sorted(again) == sorted(data)
        )
