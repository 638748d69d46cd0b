"""How much a node does: words, times, tags, and what the state file may hold."""

from __future__ import annotations

import pytest

from meshnode.api.messages import DutyStatus, PeerStatus, Status
from meshnode.cli.main import main
from meshnode.cli.status import describe
from meshnode.core.durations import format_duration, parse_duration
from meshnode.policy.duty import Duty, duty_of, tags_for
from tests.http_rig import serving


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5d", 129_600), (" 2 H ", 7200)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "0s", "2 hours", "999999d", "1e9s", "٢h"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no time like 30m, 2h or 1d"):
        parse_duration(text)


def test_times_are_told() -> None:
    told = [format_duration(seconds) for seconds in (-1, 45, 119, 120, 7199, 7200, 172_800)]
    assert told == ["0 s", "45 s", "119 s", "2 min", "120 min", "2 h", "2 days"]


@pytest.mark.parametrize("duty", Duty)
def test_a_duty_among_the_tags_of_an_advert(duty: Duty) -> None:
    tags = tags_for(duty, ("cpu", "drained", "battery"))
    assert duty_of(tags) is duty
    assert [tag for tag in tags if tag in ("cpu", "battery")] == ["cpu", "battery"]
    assert duty_of(("paused", "drained")) is Duty.DRAINED


def test_status_says_who_does_less_and_why() -> None:
    shown = describe(
        Status(
            me=PeerStatus(peer="12D3me", name="me", state="serving", first=0, last=4, duty="paused", memory_bytes=1),
            peers=(PeerStatus(peer="12D3it", name="it", state="draining", first=4, last=8, duty="drained"),),
            duty=DutyStatus(duty="paused", why="somebody asked for it"),
        )
    )
    assert "this node is paused, because somebody asked for it" in shown
    assert "serving layers 0-3, paused" in shown
    assert "giving away layers 4-7, drained" in shown


def test_a_wrong_time_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert main(["pause", "--for", "soon", "--data", str(tmp_path)]) == 2
    assert "--for: 'soon' is no time like 30m, 2h or 1d" in capsys.readouterr().err


async def test_orders_over_http_need_the_scope_admin() -> None:
    async with serving() as http:
        said = await http.post("/v1/pause", {"seconds": 60})
        assert said.json() == {
            "object": "duty",
            "duty": "paused",
            "why": "somebody asked for it",
            "ordered": "paused",
            "since_ms": 0,
            "until_ms": 0,
        }
        assert (await http.post("/v1/resume")).status_code == 200
        assert http.door.orders == [("pause", 60), ("resume", 0)]
    async with serving(keyed=True) as http:
        assert (await http.post("/v1/drain", {})).status_code == 401
        assert http.door.orders == []
