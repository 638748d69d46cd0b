"""Any plain data and any message go through the codec unharmed; anything else is refused."""

from __future__ import annotations

from typing import Any

import cbor2
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocols.codec import MAX_DEPTH, decode, dumps, encode, loads
from protocols.errors import RemoteProtocolError
from tests.unit.test_codec import THINGS, Other, Thing
from tests.wire import damaged, messages, survives

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


@settings(max_examples=200)
@given(messages(Thing) | messages(Other))
def test_messages_come_back(item: Thing | Other) -> None:
    if len(encode(item)) < 90:
        assert THINGS.decode(THINGS.encode(item)) == item
    data = encode(item)
    assert decode(type(item), data) == item
    assert dumps(loads(data)) == data


@settings(max_examples=40)
@given(messages(Thing).filter(lambda item: len(encode(item)) < 90))
def test_damaged_messages_are_refused_or_canonical(item: Thing) -> None:
    for data in damaged(THINGS.encode(item)):
        survives(data, THINGS.decode, THINGS.encode)


@settings(max_examples=500)
@given(st.binary(max_size=120))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    survives(data, THINGS.decode, THINGS.encode)
    survives(data, lambda raw: decode(Thing, raw), encode)
