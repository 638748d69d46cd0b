"""Keys on the disk and by command; where a node may listen without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshnode.cli.main import main
from meshnode.config.load import load_config
from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths
from meshnode.http.listen import bind, is_loopback
from meshnode.state.api_keys import find_key, keys
from meshnode.state.database import Database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Database(Paths(tmp_path).state).close()
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(list(words)) == code
    shown = capsys.readouterr()
    return shown.out if code == 0 else shown.err


def test_a_key_from_its_making_to_its_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", str(folder))
    text = run(capsys, "key", "add", "phone", "--scopes", "infer", "--tokens-per-day", "9", *data).splitlines()[0]
    with Database(Paths(folder).state) as state:
        found = find_key(state, text, 1)
        assert found is not None
        assert (found.name, found.scopes, found.tokens_per_day) == ("phone", ("infer",), 9)
        assert find_key(state, text[:-1] + ("A" if text[-1] != "A" else "B"), 1) is None
        for nonsense in ("", "mn-", text + "x", "mn-000000000000-" + "x" * 43):
            assert find_key(state, nonsense, 1) is None
    assert text.split("-")[2].encode() not in Paths(folder).state.read_bytes()
    assert "phone" in run(capsys, "key", "list", *data)
    (listed,) = json.loads(run(capsys, "key", "list", "--json", *data))
    assert "opens nothing any more" in run(capsys, "key", "revoke", listed["id"], *data)
    with Database(Paths(folder).state) as state:
        assert find_key(state, text, 1) is None
        assert [key.revoked_ms > 0 for key in keys(state)] == [True]
    made = json.loads(run(capsys, "key", "add", "x", "--days", "1", "--json", *data))
    with Database(Paths(folder).state) as state:
        assert find_key(state, made["key"], made["expires_ms"] - 1) is not None
        assert find_key(state, made["key"], made["expires_ms"]) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("add", "x", "--scopes", "all"), "it takes one or more of infer, embed, feedback, admin"),
        (("add", ""), "a name has 1 to 64"),
        (("add", "x", "--days", "-1"), "--days -1"),
        (("add", "x", "--requests-per-minute", "-1"), "--requests-per-minute takes 0"),
        (("revoke", "nobody"), "no key 'nobody'"),
    ],
)
def test_what_a_key_can_not_be(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    assert sentence in run(capsys, "key", *words, "--data", str(folder), code=2)


def test_a_taken_port_is_passed_over() -> None:
    first = bind("127.0.0.1:0")
    port = first.socket.getsockname()[1]
    second = bind(f"127.0.0.1:{port}")
    try:
        assert first.url == f"http://127.0.0.1:{port}"
        assert port < second.socket.getsockname()[1]
    finally:
        first.socket.close()
        second.socket.close()
    with pytest.raises(ConfigError, match="can't listen: "):
        bind("192.0.2.1:4333")


def test_only_this_machine() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "192.168.0.7", "::", "evil.example")] == [False] * 4


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("http.listen", "4333", "is not an address like 127.0.0.1:4333"),
        ("http.listen", "127.0.0.1:70000", "is not an address"),
        ("http.listen", "here.example:1", "is no IP address"),
        ("http.listen", "[1.2.3.4]:1", "in brackets"),
        ("http.cors", "chat.example", "is no origin"),
        ("http.tls_cert", "cert.pem", "whole path"),
    ],
)
def test_settings_that_can_not_be(tmp_path: Path, key: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match="http") as caught:
        load_config(tmp_path, {}, {key: value})
    assert sentence in str(caught.value)


def test_settings(tmp_path: Path) -> None:
    for listen in ("0.0.0.0:0", "[::1]:4333", "localhost:80"):
        assert load_config(tmp_path, {}, {"http.listen": listen}).http.listen == listen
    assert load_config(tmp_path, {}, {"http.cors": "https://a.example, http://b:3"}).http.cors == (
        "https://a.example",
        "http://b:3",
    )
