from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from meshnode.core.health import CODES, MAX_PER_CODE, Health, Severity

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_warning_is_shown_only_after_its_delay() -> None:
    clock = Clock()
    health = Health(clock)
    health.set("no-peers", addresses="/ip4/192.0.2.1/tcp/4331")
    assert health.current() == []
    health.set("no-peers", addresses="/ip4/192.0.2.2/tcp/4331")  # the delay counts from the first time
    assert [w.code for w in health.current(clock.now + 20)] == ["no-peers"]
    assert "192.0.2.2" in health.current(clock.now + 20)[0].text
    health.clear("no-peers")
    assert health.current(clock.now + 100) == []


def test_the_most_severe_comes_first() -> None:
    health = Health(Clock())
    health.set("refused-peer", peer="a", reason="Its invite has expired.")
    health.set("disk-low", free="1MB")
    health.set("does-not-fit", model="m", memory="1MB", needed="2MB")
    assert [w.severity for w in health.current()] == [Severity.HIGH, Severity.MEDIUM, Severity.LOW]


def test_several_peers_are_told_apart_and_events_fade() -> None:
    clock = Clock()
    health = Health(clock)
    health.set("refused-peer", peer="a", reason="It has no ticket.")
    health.set("refused-peer", peer="b", reason="It has no ticket.")
    assert len(health.current()) == 2
    health.clear("refused-peer", peer="a")
    assert [w.facts["peer"] for w in health.current()] == ["b"]
    assert health.current(clock.now + 600) == []
    health.set("refused-peer", peer="b", reason="It has no ticket.")
    health.clear("refused-peer")
    assert health.current() == []


def test_an_unknown_code_and_a_missing_fact_are_bugs() -> None:
    health = Health(Clock())
    with pytest.raises(KeyError):
        health.set("no-such-code")
    with pytest.raises(ValueError, match="addresses"):
        health.set("no-peers")


@pytest.mark.parametrize("code", CODES)
def test_every_sentence_is_one(code: str) -> None:
    warning = CODES[code]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
    facts = {name for _, name, _, _ in string.Formatter().parse(warning.sentence) if name}
    assert warning.per is None or warning.per in facts
    text = warning.sentence.format(
        **{name: "It is so." if name in ("reason", "consequence") else "X" for name in facts}
    )
    assert text[0].isupper()
    assert text.endswith(".")


def test_a_reason_ends_before_the_next_sentence_begins() -> None:
    health = Health(lambda: 0.0)
    for reason in ("the disk is full", "the disk is full."):
        health.set("engine-restarting", times="1 time", reason=reason)
        (warning,) = health.current()
        assert "the disk is full. It is started again" in warning.text


def calls(method: str) -> set[str]:
    """First arguments of every `….health.<method>("…")` of the runtime."""
    called = re.compile(rf"health\.{method}\(\s*\"([a-z-]+)\"")
    return {code for path in (ROOT / "meshnode").rglob("*.py") for code in called.findall(path.read_text())}


def test_every_code_is_set_somewhere_and_ends() -> None:
    assert calls("set") == CODES.keys()
    assert {code for code, entry in CODES.items() if entry.lasts_s is None} <= calls("clear")


def test_a_flood_of_peers_leaves_a_bounded_list() -> None:
    health = Health(lambda: 0.0)
    health.set("two-writers", peer="old")
    for number in range(1000):
        health.set("refused-peer", peer=f"p{number}", reason="it is no member")
    shown = health.current()
    assert len(shown) == MAX_PER_CODE + 1
    assert {entry.code for entry in shown} == {"two-writers", "refused-peer"}


def test_the_words_of_a_peer_steer_no_terminal() -> None:
    health = Health(lambda: 0.0)
    health.set("refused-peer", peer="p", reason="\x1b[2J\u202e")
    (shown,) = health.current()
    assert shown.text.isprintable()
    assert "\\x1b[2J" in shown.text


def test_peers_have_their_short_names_but_in_addresses_that_are_to_be_copied() -> None:
    peer = "12D3KooWG7hFxRrEvMJN1E2dJcG7eSS7SYXzsXgxU4uo2e1dWXfo"
    health = Health(lambda: 0.0)
    health.set("peer-avoided", peer=peer, seconds=30, reason=f"the node {peer} was silent")
    (shown,) = health.current()
    assert peer not in shown.text and shown.text.count("12D3…WXfo") == 2
    health.clear("peer-avoided", peer=peer)
    assert not health.current()
    health.set(
        "guest-unreachable",
        guest="x",
        addresses=f"/ip4/192.0.2.1/tcp/1/p2p/{peer}",
        since="now",
        reason="no",
        setting="s",
    )
    assert f"/p2p/{peer}" in health.current(20)[0].text
