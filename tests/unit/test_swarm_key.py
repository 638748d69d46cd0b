"""The cipher of private IPFS networks against libsodium's, and the files that hold its key."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import crypto_secretbox

from meshnode.config.load import load_config
from meshnode.core.errors import ConfigError
from meshnode.net.swarm_key import GREETING, Cover, hsalsa20, load_swarm_key, parse_swarm_key, xsalsa20
from protocols.errors import RemoteProtocolError

KEY = bytes(range(32))
HEX = b"/key/swarm/psk/1.0.0/\n/base16/\n" + KEY.hex().encode()


def test_the_vector_of_the_paper() -> None:
    """tests/core1.c of NaCl: the first key of its box, from a shared secret and a nonce of zeros."""
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    first = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    assert hsalsa20(shared, bytes(16)) == first


@given(key=st.binary(min_size=32, max_size=32), nonce=st.binary(min_size=24, max_size=24), data=st.binary())
@settings(max_examples=50)
def test_the_stream_is_that_of_libsodium(key: bytes, nonce: bytes, data: bytes) -> None:
    """secretbox puts 16 bytes of authenticator before its text and uses the first 32 of the stream for that."""
    assert xsalsa20(key, nonce).encrypt(bytes(32) + data)[32:] == crypto_secretbox(data, nonce, key)[16:]


@given(pieces=st.lists(st.binary(max_size=200)), cuts=st.lists(st.integers(1, 100), min_size=1))
@settings(max_examples=50)
def test_a_connection_can_be_cut_anywhere(pieces: list[bytes], cuts: list[int]) -> None:
    one, other = Cover(KEY), Cover(KEY)
    pieces = [GREETING, *pieces]
    wire = b"".join(one.seal(piece) for piece in pieces)
    out, at, turn = b"", 0, 0
    while at < len(wire):
        step = cuts[turn % len(cuts)]
        out += other.open(wire[at : at + step])
        at, turn = at + step, turn + 1
    assert out == b"".join(pieces)
    assert other.seal(b"answer")[24:] != b"answer"


@given(sent=st.binary(min_size=44))
@settings(max_examples=50)
def test_another_key_or_none_is_told_by_the_first_bytes(sent: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="swarm key"):
        Cover(KEY).open(sent)
    with pytest.raises(RemoteProtocolError, match="swarm key"):
        Cover(KEY).open(Cover(bytes(32)).seal(GREETING))


def test_two_connections_share_no_stream() -> None:
    assert Cover(KEY).seal(bytes(100)) != Cover(KEY).seal(bytes(100))


@pytest.mark.parametrize(
    "data",
    [
        HEX,
        HEX + b"\n",
        HEX.replace(b"\n", b"\r\n") + b"\r\n",
        b"/key/swarm/psk/1.0.0/\n/base64/\n" + base64.b64encode(KEY),
        b"/key/swarm/psk/1.0.0/\n/bin/\n" + KEY,
        b"/key/swarm/psk/1.0.0/\n/bin/\n" + KEY + b"\n",
    ],
)
def test_files_that_hold_the_key(data: bytes) -> None:
    assert parse_swarm_key(data) == KEY


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "first line"),
        (KEY.hex().encode(), "first line"),
        (HEX.replace(b"1.0.0", b"2.0.0"), "first line"),
        (HEX.replace(b"base16", b"base32"), "second line"),
        (HEX[:-2], "31 bytes"),
        (HEX + b"00", "33 bytes"),
        (HEX + b"zz", "non-hexadecimal"),
        (HEX + b"\xff", "ascii"),
        (HEX.replace(b"base16", b"base64") + b"=", "base64|padding|bytes"),
        (HEX + b" " * 2000, "more than 1024"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "swarm.key"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"(?s)network.swarm_key: .*swarm.key is not the swarm.key .*{why}"):
        load_swarm_key(str(path))


def test_the_setting_is_a_whole_path(tmp_path: Path) -> None:
    environ = {"MESHNODE_NETWORK__SWARM_KEY": "swarm.key"}
    with pytest.raises(ConfigError, match="not the whole path"):
        load_config(tmp_path, environ)
    assert load_config(tmp_path, {}, {"network.swarm_key": "/etc/swarm.key"}).network.swarm_key == "/etc/swarm.key"


def test_no_file(tmp_path: Path) -> None:
    assert load_swarm_key("") == b""
    with pytest.raises(ConfigError, match="No such file"):
        load_swarm_key(str(tmp_path / "swarm.key"))
