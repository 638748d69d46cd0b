from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from meshnode.config.load import describe, load_config
from meshnode.config.values import Amount, hours_of, parse_amount
from meshnode.core.errors import ConfigError
from meshnode.core.sizes import format_size, parse_size

PEER = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"


def written(folder: Path, text: str) -> Path:
    (folder / "config.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "size"),
    [("40MB", 40_000_000), ("1.5GiB", 3 << 29), ("4096", 4096), (0, 0), ("7 kb", 7000), ("2g", 2_000_000_000)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "-4MB", "4 parsec", "1e9", "nan", -1, "9" * 30, "9" * 400, 1 << 63, "1,5GB", "٣MB"]
)
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"size|negative|disk"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (0, 999, 98_600_000, 1_500_000_000)] == ["0 B", "999 B", "98.6 MB", "1.5 GB"]
    assert [format_size(n) for n in (1000, 999_499, 999_500, 999_999_999)] == ["1 kB", "999 kB", "1 MB", "1 GB"]
    assert format_size(999 * 10**12) == "999 TB"


def test_an_amount_is_bytes_or_a_share() -> None:
    assert parse_amount("50%").of(1000) == 500
    assert parse_amount("1kb").of(10) == 1000
    assert parse_amount(0).off
    assert parse_amount("0%").off
    for wrong in ("101%", "-1%", "half", True, None, 1.5):
        with pytest.raises(ValueError, match=r"amount|everything"):
            parse_amount(wrong)


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    written(tmp_path, '[serve]\nmemory = "1GB"\nthreads = 2\nsessions = 3\n')
    environ = {"MESHNODE_SERVE__MEMORY": "2GB", "MESHNODE_SERVE__THREADS": "4", "MESHNODE_DATA": "x", "HOME": "/h"}
    config = load_config(tmp_path, environ, {"serve.memory": "50%", "log.level": None})
    assert config.serve.memory == Amount(percent=50)
    assert (config.serve.threads, config.serve.sessions, config.log.level) == (4, 3, "info")
    assert config.origins["serve.memory"] == "the command line"
    assert config.origins["serve.threads"] == "the environment variable MESHNODE_SERVE__THREADS"
    assert config.origins["serve.sessions"] == str(tmp_path / "config.toml")
    assert "log.level" not in config.origins


def test_lists_come_from_file_and_environment(tmp_path: Path) -> None:
    address = f"/ip4/192.0.2.7/tcp/4331/p2p/{PEER}"
    written(tmp_path, f'[network]\nbootstrap = ["{address}"]\n')
    assert load_config(tmp_path, {}).network.bootstrap == (address,)
    environ = {"MESHNODE_NETWORK__LISTEN": "/ip4/127.0.0.1/tcp/0, /ip6/::1/tcp/0"}
    assert load_config(tmp_path, environ).network.listen == ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[serve]\nmemry = "1GB"\n', ["config.toml", "serve.memry", "serve.memory"]),
        ('[srve]\nmemory = "1GB"\n', ["config.toml", "[srve]", "serve"]),
        ('memory = "1GB"\n', ["config.toml", "memory", "[serve]"]),
        ('[serve]\nmemory = "lots"\n', ["config.toml", "serve.memory", "'lots'", "50%"]),
        ("[serve]\nthreads = 0\n", ["serve.threads", "1 to 256"]),
        ("[serve]\nthreads = true\n", ["serve.threads", "true is not"]),
        ('[network]\nlisten = ["0.0.0.0:4331"]\n', ["network.listen", "/ip4/0.0.0.0/tcp/4331"]),
        ('[network]\nlisten = ["/ip4/0.0.0.0/tcp/70000"]\n', ["network.listen", "65535"]),
        ('[network]\nbootstrap = ["/ip4/192.0.2.7/tcp/4331"]\n', ["network.bootstrap", "/p2p/"]),
        (
            f'[content]\nipfs_peers = ["/ip4/192.0.2.7/udp/4001/quic-v1/p2p/{PEER}"]\n',
            ["content.ipfs_peers", "only /tcp addresses with ip4, ip6", "like /ip4/192.0.2.7/tcp"],
        ),
        (f'[content]\ndht = ["/ip4/192.0.2.7/tcp/4001/ws/p2p/{PEER}"]\n', ["content.dht", "only /tcp addresses"]),
        (f'[content]\ndht = ["/dns4/a.example/tcp/443/wss/p2p/{PEER}"]\n', ["content.dht", "only /tcp addresses"]),
        (
            f'[content]\ndht = ["/dnsaddr/bootstrap.libp2p.io/p2p/{PEER}"]\n',
            ["content.dht", "only /tcp addresses with ip4", "/dnsaddr is not resolved"],
        ),
        (
            '[content]\nipfs_peers = ["/ip4/192.0.2.7/tcp/4331/p2p/12D3KooW..."]\n',
            ["content.ipfs_peers", "the dots stand for the rest of the peer id"],
        ),
        ('[log]\nlevel = "loud"\n', ["log.level", "debug, info"]),
        ('[node]\nname = "a\\nb"\n', ["node.name", "printable"]),
        ("[serve\n", ["config.toml", "TOML"]),
        ("[serve]\nthreads = " + "9" * 5000, ["config.toml", "TOML"]),
        ("[network]\nlisten = " + "[" * 3000, ["config.toml", "TOML", "nested too deeply"]),
        (f'[network]\nlisten = ["/ip4/0.0.0.0/tcp/{"0" * 5000}1"]\n', ["network.listen"]),
        ("[learn]\nenabled = 2\n", ["learn.enabled", "2 is neither true nor false"]),
        ("[learn]\nepsilon = -1\n", ["learn.epsilon", "-1 is not a number from 0 to 1000"]),
        ("[learn]\nepsilon = nan\n", ["learn.epsilon", "nan is not a number"]),
        ('[learn]\ndelta = "1"\n', ["learn.delta", "1e-12 to 0.1"]),
        ('[learn]\nmode = "star"\n', ["learn.mode", "pairwise"]),
        ('[learn]\nhours = "night"\n', ["learn.hours", "'night' is not a part of the day like 22:00-6:30"]),
        ("[content]\nquota = true\n", ["content.quota", "true is not an amount"]),
        ('[content]\nswarm_key = "/k"\n', ["content.swarm_key", "the nearest is network.swarm_key"]),
        ("[content]\nipfs_publish = true\n", ["content.ipfs_publish", "config.toml", "content.ipfs_api"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), {})
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_variable_is_named_and_others_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MESHNODE_SERVE__MEMRY.*serve\.memory"):
        load_config(tmp_path, {"MESHNODE_SERVE__MEMRY": "1"})
    assert load_config(tmp_path, {"MESHNODE_DEBUG": "1", "OTHER__X": "1"}).origins == {}


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.toml can't be read"):
        load_config(tmp_path, {})


def test_the_description_is_a_config_file_with_the_same_meaning(tmp_path: Path) -> None:
    before = load_config(tmp_path, {}, {"serve.memory": "30%", "content.quota": "5GB", "node.name": 'a "b"'})
    text = describe(before)
    assert "the command line" in text
    assert tomllib.loads(text)["serve"]["memory"] == "30%"
    after = load_config(written(tmp_path, text), {})
    assert (before.node, before.network, before.serve, before.content, before.learn, before.log) == (
        (after.node, after.network, after.serve, after.content, after.learn, after.log)
    )


def test_learning_is_off_until_the_owner_says_so(tmp_path: Path) -> None:
    learn = load_config(tmp_path, {}).learn
    assert (learn.enabled, learn.keep_answers, learn.power, learn.epsilon) == (False, True, "mains", 0.0)
    text = '[learn]\nenabled = true\nhours = "22-6:30"\nepsilon = 8\ndelta = 1e-6\npower = "any"\nmax_size = "5MB"\n'
    learn = load_config(written(tmp_path, text), {}).learn
    assert (learn.enabled, learn.hours, learn.epsilon, learn.delta) == (True, "22-6:30", 8.0, 1e-6)
    environ = {"MESHNODE_LEARN__EPSILON": "0.5", "MESHNODE_LEARN__DELTA": "1e-7", "MESHNODE_LEARN__HOURS": ""}
    learn = load_config(tmp_path, environ).learn
    assert (learn.epsilon, learn.delta, learn.hours, learn.power) == (0.5, 1e-7, "", "any")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("22:00-6:30", (1320, 390)),
        ("7-22", (420, 1320)),
        ("8 - 24", (480, 0)),
        ("0-12:05", (0, 725)),
        ("8-8", None),
        ("0-24", None),
        ("24-8", None),
        ("7-25", None),
        ("7:60-8", None),
        ("", None),
    ],
)
def test_parts_of_the_day(text: str, minutes: tuple[int, int] | None) -> None:
    assert hours_of(text) == minutes


def test_a_dht(tmp_path: Path) -> None:
    content = load_config(tmp_path, {}).content
    assert (content.dht, content.share) == ((), "members")
    peer = "/dns4/dht.example/tcp/4001/p2p/QmUBDEuBZRC6fRU5wXxA4xxtDwHU2SBAFkcGTPWwDkFKCp"
    text = f'[content]\ndht = ["{peer}"]\nshare = "anyone"\n'
    content = load_config(written(tmp_path, text), {}).content
    assert (content.dht, content.share) == ((peer,), "anyone")
    for wrong in (peer.rpartition("/p2p/")[0], peer.replace("tcp", "udp"), peer.replace("4001", "0")):
        with pytest.raises(ConfigError, match=r"content\.dht"):
            load_config(tmp_path, {"MESHNODE_CONTENT__DHT": wrong})


def test_an_ipfs_daemon_and_gateways(tmp_path: Path) -> None:
    assert load_config(tmp_path, {}).content.ipfs_api == ""
    assert load_config(tmp_path, {}).content.gateways == ()
    assert load_config(tmp_path, {}).content.ipfs_publish is False
    text = (
        '[content]\nipfs_api = "/dns4/kubo/tcp/5001"\nipfs_publish = true\n'
        'gateways = ["https://a.example/", "http://[::1]:8080/x"]\n'
    )
    content = load_config(written(tmp_path, text), {}).content
    assert content.ipfs_api == "/dns4/kubo/tcp/5001"
    assert content.ipfs_publish is True
    assert content.gateways == ("https://a.example", "http://[::1]:8080/x")
    (tmp_path / "config.toml").write_text(describe(load_config(tmp_path, {})))
    assert load_config(tmp_path, {}).content == content
    environ = {
        "MESHNODE_CONTENT__IPFS_API": "",
        "MESHNODE_CONTENT__IPFS_PUBLISH": "False",
        "MESHNODE_CONTENT__GATEWAYS": "https://b.example,https://c.example",
    }
    content = load_config(tmp_path, environ).content
    assert content.ipfs_publish is False
    assert (content.ipfs_api, content.gateways) == ("", ("https://b.example", "https://c.example"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("content.ipfs_api", "http://127.0.0.1:5001"),
        ("content.ipfs_api", "/ip4/127.0.0.1/tcp/0"),
        ("content.ipfs_api", "/ip4/127.0.0.1/tcp/5001,/ip4/127.0.0.1/tcp/5002"),
        ("content.ipfs_api", 5001),
        ("content.ipfs_publish", "perhaps"),
        ("content.ipfs_publish", 2),
        ("content.gateways", "gateway.example"),
        ("content.gateways", "ftp://gateway.example"),
        ("content.gateways", "https://user:secret@gateway.example"),
        ("content.gateways", "https://gateway.example/?format=car"),
        ("content.gateways", "https://gateway.example:99999"),
        ("content.gateways", [7]),
        ("content.gateways", ["https://gateway.example"] * 17),
        ("content.gateways", 7),
    ],
)
def test_what_is_no_daemon_and_no_gateway(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(tmp_path, {}, {key: value})
