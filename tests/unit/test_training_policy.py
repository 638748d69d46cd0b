"""When a device may train, and what the scheduler makes of past rounds."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from meshnode.policy.drift import FEWEST, LAST, drift_of
from meshnode.policy.idle import DeviceFacts, IdleRule, may_train
from meshnode.policy.training import MAX_PARTNERS, Choice, Scheduler, Situation, fixed

RULE = IdleRule(battery_too=False, battery_floor_percent=60, load_percent=30, owner_idle_s=300, hours=None)
IDLE = DeviceFacts(on_mains=True, battery_percent=80, load_percent=5, owner_idle_s=900, minute=720)


# ---------------------------------------------------------------- the idle rule


def test_an_idle_device_on_mains_may() -> None:
    assert may_train(IDLE, RULE).may
    assert may_train(DeviceFacts(), RULE).may, "one that can't tell has no battery and no screen"


@pytest.mark.parametrize(
    ("facts", "rule", "words"),
    [
        ({"on_mains": False}, {}, "it runs on its battery"),
        ({"on_mains": False, "battery_percent": 59}, {"battery_too": True}, "battery is at 59 %, below 60 %"),
        ({"owner_idle_s": 299}, {}, "somebody worked on it 299 s ago; it waits for 300 s"),
        ({"load_percent": 30.6}, {}, "other work takes 31 % of it, more than 30 %"),
        ({"minute": 419}, {"hours": (420, 1320)}, "it trains from 7:00 to 22:00 only"),
        ({"minute": 1320}, {"hours": (420, 1320)}, "it trains from 7:00 to 22:00 only"),
        ({"minute": 720}, {"hours": (1320, 420)}, "it trains from 22:00 to 7:00 only"),
    ],
)
def test_what_forbids_it(facts: dict[str, object], rule: dict[str, object], words: str) -> None:
    verdict = may_train(replace(IDLE, **facts), replace(RULE, **rule))  # type: ignore[arg-type]
    assert not verdict.may and words in verdict.why


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        ({"on_mains": False, "battery_percent": 60}, {"battery_too": True}),
        ({"on_mains": False, "battery_percent": None}, {"battery_too": True}),
        ({"owner_idle_s": 0}, {"owner_idle_s": 0}),
        ({"load_percent": 30}, {}),
        ({"minute": 420}, {"hours": (420, 1320)}),
        ({"minute": 1439}, {"hours": (1320, 420)}),
        ({"minute": 0}, {"hours": (1320, 420)}),
    ],
)
def test_what_does_not(facts: dict[str, object], rule: dict[str, object]) -> None:
    assert may_train(replace(IDLE, **facts), replace(RULE, **rule)).may  # type: ignore[arg-type]


# ---------------------------------------------------------------- drift


def test_drift_is_told_above_a_share_and_not_from_a_handful() -> None:
    assert not drift_of([False] * (FEWEST - 1)).alarming
    assert drift_of([False, False] + [True] * (FEWEST - 2)).alarming
    assert not drift_of([False] + [True] * (FEWEST - 1)).alarming, "5 % is not above 5 %"
    assert not drift_of([True] * LAST + [False] * 500).alarming, "what is long ago does not count"
    assert drift_of([]).rate == 0
    told = drift_of([False] * 3 + [True] * 27)
    assert (told.wrong, told.judged, told.rate) == (3, 30, 0.1)


# ---------------------------------------------------------------- the scheduler


class Machine:
    """A device whose samples teach something while they are new. Rounds are broken off when it is not idle."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.new = 0
        self.last = 0.0

    def situation(self) -> Situation:
        self.new += 8 if self.rng.random() < 0.25 else 0
        return Situation(idle_s=self.rng.choice((120, 3600)), new_samples=self.new, last_gain=self.last)

    def train(self, situation: Situation, steps: int, best: bool) -> float:
        if not steps:
            return 0.0
        gain = 0.0 if situation.idle_s < 600 else 0.08 * min(self.new, 16) / 16 * math.log1p(steps / 10) / math.log(2)
        gain *= 1.5 if best else 0.75
        self.new, self.last = 0, gain
        return gain + self.rng.gauss(0, 0.01)


PRICE = 0.01  # of ten steps


def net_gain(seed: int, *, learns: bool) -> tuple[float, Scheduler]:
    """Gain minus the price of the steps over 200 chances to train."""
    rng = random.Random(seed)
    machine, scheduler, total = Machine(rng), Scheduler(10, random.Random(seed + 1)), 0.0
    for number in range(200):
        situation = machine.situation()
        if learns:
            choice = scheduler.choose(situation, ("attic", "cellar", "shed"))
        else:
            choice = fixed(600 if number % 2 else 0, 600, 10, ("attic", "cellar", "shed")[number % 3 :])
        gain = machine.train(situation, choice.steps, choice.partner == "shed")
        scheduler.learn(situation, choice, gain)
        total += gain - PRICE * choice.steps / 10
    return total, scheduler


def test_experience_is_worth_more_than_a_clock(rng: random.Random) -> None:
    seeds = [rng.getrandbits(32) for _ in range(8)]
    learned = sum(net_gain(seed, learns=True)[0] for seed in seeds)
    clocked = sum(net_gain(seed, learns=False)[0] for seed in seeds)
    print(f"net gain: {learned:.2f} by experience, {clocked:.2f} by the clock")
    assert learned > 1.5 * max(clocked, 0.0)


def test_it_waits_where_nothing_is_to_be_gained_and_trains_where_something_is() -> None:
    _, scheduler = net_gain(7, learns=True)
    busy, idle = (Situation(idle_s=idle_s, new_samples=24, last_gain=0.05) for idle_s in (60, 3600))
    nothing = Situation(idle_s=3600, new_samples=0, last_gain=0.0)

    def share(situation: Situation) -> float:
        return sum(scheduler.choose(situation).steps > 0 for _ in range(200)) / 200

    print(f"trains in {share(idle):.0%} when idle with new samples, {share(busy):.0%} when busy")
    assert share(idle) > 0.9 and share(busy) < share(idle) and share(nothing) < share(idle)
    partners = [scheduler.choose(idle, ("attic", "cellar", "shed")).partner for _ in range(200)]
    assert partners.count("shed") > 100


def test_a_low_battery_makes_it_dearer() -> None:
    def steps(battery: float) -> int:
        scheduler = Scheduler(10, random.Random(5))
        for _ in range(20):
            situation = Situation(idle_s=600, new_samples=10, last_gain=0.02)
            scheduler.learn(situation, Choice(steps=10, partner=None, why=""), 0.02)
        situation = Situation(idle_s=600, new_samples=10, last_gain=0.02, battery=battery)
        return sum(scheduler.choose(situation).steps for _ in range(100))

    assert steps(0.1) < steps(1.0)


def test_the_same_seed_and_past_give_the_same_choice_and_both_survive(rng: random.Random) -> None:
    seed = rng.getrandbits(32)
    situation = Situation(idle_s=1000, new_samples=5, last_gain=0.1, battery=0.5)
    (_, one), (_, other) = net_gain(seed, learns=True), net_gain(seed, learns=True)
    assert one.choose(situation) == other.choose(situation)
    state = json.loads(json.dumps(one.as_json()))
    again = Scheduler(10, random.Random(1), state)
    assert again.as_json() == one.as_json()
    assert again.choose(situation, ("attic",)) == Scheduler(10, random.Random(1), state).choose(situation, ("attic",))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"precision": [], "moment": [], "rounds": 1, "partners": []},
        {"precision": [[0.0] * 4] * 4, "moment": [0] * 4, "rounds": 1, "partners": []},
        {"precision": "x", "moment": None, "rounds": 1, "partners": 3},
        {"precision": [[math.nan] * 4] * 4, "moment": [0] * 4, "rounds": 1, "partners": []},
    ],
)
def test_a_damaged_past_is_none(state: dict[str, object]) -> None:
    assert Scheduler(10, random.Random(1), state).as_json() == Scheduler(10, random.Random(1)).as_json()


def test_it_says_in_words_what_it_does() -> None:
    scheduler = Scheduler(10, random.Random(3))
    situation = Situation(idle_s=720, new_samples=34, last_gain=0.0)
    choice = scheduler.choose(situation, ("attic",))
    assert choice.steps in (2, 5, 10, 20)
    assert choice.why.startswith(
        f"trains {choice.steps} steps with attic: 34 new samples, idle for 12 min; before the"
    )
    for _ in range(10):
        scheduler.learn(situation, Choice(steps=10, partner="attic", why=""), -0.2)
    waits = scheduler.choose(replace(situation, battery=0.5))
    assert waits.steps == 0 and waits.partner is None
    assert waits.why == (
        "waits: 34 new samples, idle for 12 min, battery at 50 %; after 10 rounds, a round of 10 steps is believed "
        "to lower the loss by 0.000"
    )


def test_partners_are_remembered_within_bounds_and_gains_are_numbers() -> None:
    scheduler = Scheduler(1, random.Random(3))
    situation = Situation(idle_s=0, new_samples=0, last_gain=0)
    for number in range(MAX_PARTNERS + 9):
        scheduler.learn(situation, Choice(steps=1, partner=f"p{number}", why=""), 0.1)
    assert len(scheduler.as_json()["partners"]) == MAX_PARTNERS
    with pytest.raises(ValueError, match="a gain is a number"):
        scheduler.learn(situation, Choice(steps=1, partner=None, why=""), math.nan)


def test_fixed_intervals() -> None:
    assert fixed(599, 600, 10).why == "waits: the next round is due in 1 min (learn.interval)"
    due = fixed(600, 600, 10, ("attic", "shed"))
    assert (due.steps, due.partner) == (10, "attic") and due.why == "trains 10 steps with attic, as every 10 min"
    assert fixed(600, 600, 10).partner is None
