"""The short form of `make fuzz`, and that it would find something."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from protocols.errors import RemoteProtocolError
from tests.fuzz import run as fuzz
from tests.fuzz.mutate import injured
from tests.fuzz.targets import TARGETS, Ready, Target

SECONDS = 0.3


@pytest.mark.parametrize("name", fuzz.runnable())
def test_a_moment_of(name: str, rng: random.Random) -> None:
    ran = fuzz.run(name, rng.randrange(1 << 31), seconds=SECONDS)
    assert ran.inputs > 0


@pytest.mark.parametrize("name", fuzz.runnable())
def test_something_gets_past_the_first_checks(name: str, tmp_path: Path) -> None:
    """Otherwise nothing behind them would be fuzzed. Those that sign what they take say nothing of it."""
    ready = TARGETS[name].make(tmp_path)
    taken = [fuzz.take(name, ready, seed) for seed in ready.seeds]
    assert any(taken) or name in ("advert", "trust", "car import")


def failing(monkeypatch: pytest.MonkeyPatch, take: fuzz.Take) -> None:
    monkeypatch.setitem(TARGETS, "failing", Target(lambda folder: Ready([b"abc"], take, None, (injured,))))


def test_an_error_that_is_none_of_ours_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(data: bytes) -> bool:
        if b"\xff" in data:
            raise KeyError("a bug")
        raise RemoteProtocolError("refused")

    failing(monkeypatch, take)
    with pytest.raises(fuzz.Crash, match="a bug") as caught:
        fuzz.run("failing", 1, inputs=100_000)
    assert b"\xff" in caught.value.data


def test_an_input_that_takes_too_long_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(data: bytes) -> bool:
        while True:
            pass

    monkeypatch.setattr(fuzz, "CPU_S", 0.05)
    failing(monkeypatch, take)
    with pytest.raises(fuzz.Crash, match="processor time"):
        fuzz.run("failing", 1, inputs=1)


def test_memory_that_grows_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []

    def take(data: bytes) -> bool:
        kept.append(bytes(1 << 16))
        return False

    monkeypatch.setattr(fuzz, "GROWTH_KB", 16 << 10)
    monkeypatch.setattr(fuzz, "WARM_UP", 10)
    failing(monkeypatch, take)
    with pytest.raises(fuzz.Crash, match="memory has grown"):
        fuzz.run("failing", 1, inputs=5000)
