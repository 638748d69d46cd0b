from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from protocols.codec import MAX_DEPTH, Union, at, decode, dumps, encode, loads, message
from protocols.errors import LocalProtocolError, RemoteProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    value: int = at(1, high=255)


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    late: int = at(300, default=0)  # declared first, written last
    ident: bytes = at(1, size=2)
    name: str = at(2, limit=5)
    flag: bool = at(3)
    inner: Inner | None = at(4)
    inners: tuple[Inner, ...] = at(5, limit=3, default=())
    words: tuple[str, ...] = at(6, limit=2, default=())
    count: int = at(7, low=2, high=9, default=2)


@message(tag=4)
@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    count: int = at(1)


THINGS: Union[Thing | Other] = Union("things", Thing, Other, limit=100)
THING = Thing(ident=b"ab", name="x", flag=True, inner=Inner(value=7))
WIRE = {1: b"ab", 2: "x", 3: True, 4: {1: 7}}


def test_defaults_and_none_are_left_off_the_wire() -> None:
    assert encode(THING) == dumps(WIRE)
    assert loads(encode(Thing(ident=b"ab", name="", flag=False, inner=None, late=1))) == {
        1: b"ab", 2: "", 3: False, 300: 1
    }  # fmt: skip
    assert decode(Thing, encode(THING)) == THING


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "cut off"),
        ("a1", "cut off"),
        ("a10100 00", "1 more byte"),
        ("1800", "a long 0"),
        ("190017", "a long 23"),
        ("1a0000ffff", "a long 65535"),
        ("1b00000000ffffffff", "a long 4294967295"),
        ("1c", "reserved length"),
        ("a2 0100 0101", "a duplicate key"),
        ("a2 0200 0100", "keys out of order"),
        ("a1 2000", "a negative key"),
        ("a1 410000", "a key of bytes"),
        ("a1 f600", "null as a key"),
        ("a1 8000", "an array as a key"),
        ("f90000", "a half float"),
        ("fa00000000", "a float"),
        ("fb7ff8000000000000", "NaN"),
        ("f97e00", "short NaN"),
        ("f7", "undefined"),
        ("e0", "simple value 0"),
        ("f820", "simple value 32"),
        ("ff", "break"),
        ("9fff", "an indefinite array"),
        ("bfff", "an indefinite map"),
        ("5f40ff", "indefinite bytes"),
        ("7f60ff", "an indefinite text"),
        ("c249010000000000000000", "a big integer"),
        ("c000", "a date"),
        ("d8236161", "a regular expression"),
        ("d81c81d81d00", "a cycle of shared references"),
        ("d9010280", "a set"),
        ("61ff", "a text that is not UTF-8"),
        ("63eda080", "half a surrogate pair"),
        ("62c080", "overlong UTF-8"),
    ],
)
def test_what_is_not_canonical_is_refused(data: str, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=r"canonical|cut off|were sent"):
        loads(bytes.fromhex(data))


def test_the_whole_range_of_integers_is_read_but_fields_are_signed_63_bit() -> None:
    for number in (0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -1, -24, -25, -(2**64)):
        assert loads(dumps(number)) == number
    with pytest.raises(RemoteProtocolError, match=r"Other\.count is 18446744073709551615, allowed are 0 to"):
        decode(Other, dumps({1: 2**64 - 1}))


def test_nesting_has_a_limit() -> None:
    deep: object = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert loads(dumps(deep)) == deep
    with pytest.raises(RemoteProtocolError, match="nested deeper"):
        loads(dumps([deep]))
    for bomb in (b"\x81" * 100_000, b"\xa1\x01" * 100_000, b"\xa1\x01\x81" * 100_000):
        with pytest.raises(RemoteProtocolError, match="nested deeper"):
            loads(bomb)


@pytest.mark.parametrize("start", [0x5A, 0x7A, 0x9A, 0xBA, 0x5B, 0x7B, 0x9B, 0xBB])
def test_a_huge_declared_length_is_cut_off(start: int) -> None:
    width = 4 if start & 31 == 26 else 8
    for size in (b"\x7f" + b"\xff" * (width - 1), b"\xff" * width, b"\x00\x10" + b"\0" * (width - 2)):
        data = bytes((start,)) + size
        with pytest.raises(RemoteProtocolError):
            loads(data)
        with pytest.raises(RemoteProtocolError):
            loads(b"\x81" * 8 + data + b"\0" * 64)


def test_huge_declared_lengths_allocate_nothing() -> None:
    """In a process that may use only 64 MiB more than it has: 100 lengths of up to 2^63 do not end it."""
    program = """
import resource
from protocols.codec import loads
from protocols.errors import RemoteProtocolError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
refused = 0
for bits in range(27, 63):
    for major in (0x5B, 0x7B, 0x9B, 0xBB):
        try:
            loads(bytes((major,)) + (1 << bits).to_bytes(8, "big") + bytes(1000))
        except RemoteProtocolError:
            refused += 1
print(refused)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert int(result.stdout) == 36 * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({1: b"abc"}, "Thing.ident has 3 bytes instead of 2"),
        ({1: "ab"}, "Thing.ident is a str, not a bytes"),
        ({2: "abcdef"}, "Thing.name has a length of 6, the limit is 5"),
        ({2: None}, "Thing.name is a NoneType"),
        ({3: 1}, "Thing.flag is a int"),
        ({4: None}, "Inner is a NoneType"),
        ({4: []}, "Inner is a list, not a map"),
        ({4: {1: 256}}, "Inner.value is 256, allowed are 0 to 255"),
        ({4: {1: True}}, "Inner.value is a bool"),
        ({4: {}}, "Inner.value (key 1) is missing"),
        ({4: {0: 3, 1: 7}}, "unknown even key 0"),
        ({5: []}, "spells out its default"),
        ({5: {}}, "Thing.inners is a dict, not an array"),
        ({5: [{1: 1}] * 4}, "Thing.inners has 4 items, the limit is 3"),
        ({5: [1]}, "Inner is a int, not a map"),
        ({6: ["a" * 4097]}, "an item of Thing.words has a length of 4097"),
        ({6: [b"a"]}, "Thing.words is a bytes, not a str"),
        ({7: 2}, "spells out its default"),
        ({7: 1}, "Thing.count is 1, allowed are 2 to 9"),
        ({8: 0}, "unknown even key 8"),
        ({"x" * 9000: 0}, "keys are integers"),
    ],
)
def test_what_breaks_a_declaration_is_refused_with_the_field_and_the_limit(
    change: dict[object, object], words: str
) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(Thing, dumps({**WIRE, **change}))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_unknown_odd_keys_are_ignored() -> None:
    assert decode(Thing, dumps({**WIRE, 9: {"anything": [1, None]}, 301: 0})) == THING
    assert THINGS.decode(dumps({0: 3, **WIRE, 9: 1})) == THING


@pytest.mark.parametrize("key", sorted(WIRE))
def test_a_missing_field_is_named(key: int) -> None:
    wire = {k: v for k, v in WIRE.items() if k != key}
    if key == 4:  # optional
        assert decode(Thing, dumps(wire)).inner is None
    else:
        with pytest.raises(RemoteProtocolError, match=rf"key {key}\) is missing"):
            decode(Thing, dumps(wire))


def test_a_union_tells_its_messages_apart() -> None:
    for item in (THING, Other(count=5)):
        assert THINGS.decode(THINGS.encode(item)) == item
    assert set(THINGS) == {Thing, Other}


@pytest.mark.parametrize("tag", [None, 5, True, "3", [3], {3: 3}, -1, "x" * 50])
def test_a_foreign_tag_is_refused(tag: object) -> None:
    with pytest.raises(RemoteProtocolError, match="no message with the tag"):
        THINGS.decode(dumps({0: tag, **WIRE}))


def test_a_union_has_a_size_limit_both_ways() -> None:
    big = Thing(ident=b"ab", name="", flag=True, inner=None, words=("a" * 100,))
    with pytest.raises(LocalProtocolError, match="limit 100"):
        THINGS.encode(big)
    with pytest.raises(RemoteProtocolError, match="limit 100"):
        THINGS.decode(b"\0" * 101)
    with pytest.raises(RemoteProtocolError, match="not a map"):
        THINGS.decode(dumps([0, 3]))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Thing(ident=b"abc", name="x", flag=True, inner=None), "3 bytes instead of 2"),
        (Thing(ident=b"ab", name="x" * 6, flag=True, inner=None), "limit is 5"),
        (Thing(ident=b"ab", name="\ud800", flag=True, inner=None), "can't be encoded"),
        (Thing(ident=b"ab", name="x", flag=1, inner=None), "is a int"),  # type: ignore[arg-type]
        (Thing(ident=b"ab", name=None, flag=True, inner=None), "is missing"),  # type: ignore[arg-type]
        (Thing(ident=b"ab", name="", flag=True, inner=None, count=True), "is a bool"),
        (Thing(ident=b"ab", name="", flag=True, inner=None, count=None), "is missing"),  # type: ignore[arg-type]
        (Thing(ident=b"ab", name="", flag=True, inner=None, words="ab"), "not a tuple"),  # type: ignore[arg-type]
        (Thing(ident=b"ab", name="", flag=True, inner=None, words=("a",) * 3), "limit is 2"),
    ],
)
def test_our_own_mistakes_are_ours(wrong: Thing, words: str) -> None:
    for carry in (encode, THINGS.encode):
        with pytest.raises(LocalProtocolError, match=words):
            carry(wrong)


def test_a_foreign_class_does_not_enter_a_union() -> None:
    with pytest.raises(LocalProtocolError, match="Inner is no message of things"):
        THINGS.encode(Inner(value=1))  # type: ignore[arg-type]


def test_a_wrong_declaration_is_refused() -> None:
    @dataclass(frozen=True)
    class Twice:
        a: int = at(1)
        b: int = at(1)

    @dataclass(frozen=True)
    class Zero:
        a: int = at(0)

    @dataclass(frozen=True)
    class Endless:
        a: str = at(1)

    @dataclass(frozen=True)
    class Float:
        a: float = at(1)

    for wrong in (Twice(a=1, b=1), Zero(a=1), Endless(a="x"), Float(a=1.0)):
        with pytest.raises(LocalProtocolError):
            encode(wrong)
    with pytest.raises(LocalProtocolError, match="share a tag"):
        Union("same", Thing, Thing, limit=9)
