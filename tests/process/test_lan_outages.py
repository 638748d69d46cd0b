"""Real nodes at a switch that loses its power, and whose machines get new addresses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshnode.harness.member import Member
from tests.process import lan as lans
from tests.process.lan import PORT, Lan
from tests.process.mesh_rig import mesh_of

pytestmark = [pytest.mark.net, pytest.mark.process, pytest.mark.slow]

NODES = 3
BACK_S = 10.0  # promised
MOVED_S = 15.0  # promised
PATIENCE_S = 20.0
OUTAGES_S = (60, 300)


@contextmanager
def nodes_at_switch(
    folder: Path, *, seed: bool, settings: tuple[tuple[str, object], ...] = ()
) -> Iterator[tuple[Lan, list[Member]]]:
    """Three nodes at one switch; the first one is everybody's bootstrap peer, or they know nobody's address there."""
    trouble = lans.why_not()
    if trouble:
        pytest.skip(f"no network namespaces here: {trouble}")
    with mesh_of(folder, NODES, wait=False, settings=settings) as mesh:
        mesh.down()  # they have joined
        members = mesh.members
        with Lan.open(NODES) as lan:
            for number, member in enumerate(members):
                address = f"/ip4/10.77.0.1/tcp/{PORT}/p2p/{members[0].peer_id}"
                lan.start(member, number, NETWORK__BOOTSTRAP=address if seed else "")
            for member in members:
                member.wait_answers()
            connected(members, NODES - 1)
            yield lan, members
            mesh.down()


@pytest.fixture
def at_switch(tmp_path: Path) -> Iterator[tuple[Lan, list[Member]]]:
    with nodes_at_switch(tmp_path, seed=True, settings=(("network.local_discovery", False),)) as found:
        yield found


def connected(members: list[Member], count: int) -> float:
    """Wait until every node is connected to so many others; the seconds that it took."""
    began = time.monotonic()
    for member in members:
        member.wait_for(lambda s: sum(peer.connected for peer in s.peers) == count, PATIENCE_S, f"{count} peers")
    return time.monotonic() - began


@pytest.mark.parametrize("seconds", OUTAGES_S)
@pytest.mark.long
def test_all_are_back_soon_after_the_switch_is(at_switch: tuple[Lan, list[Member]], seconds: float) -> None:
    lan, members = at_switch
    began = time.monotonic()
    lan.unplug()
    connected(members, 0)
    time.sleep(max(0.0, began + seconds - time.monotonic()))  # the outage itself, not something that is waited for
    lan.plug_in()
    took = connected(members, NODES - 1)
    print(f"\nafter {seconds} s without links: all connected {took:.1f} s after they were back")
    assert took < BACK_S


@pytest.mark.long
def test_who_gets_a_new_address_is_found_by_those_who_stay(at_switch: tuple[Lan, list[Member]]) -> None:
    lan, members = at_switch
    before = [member.status().me.incarnation for member in members]
    lan.readdress(2, "10.77.9.3")
    began = time.monotonic()
    for machine, others in enumerate(
        ({"10.77.0.2", "10.77.9.3"}, {"10.77.0.1", "10.77.9.3"}, {"10.77.0.1", "10.77.0.2"})
    ):
        while not others <= lan.talks_to(machine):
            assert time.monotonic() - began < PATIENCE_S, f"{machine} talks to {lan.talks_to(machine)}"
            time.sleep(0.1)
    connected(members, NODES - 1)
    print(f"\na new address: all connected after {time.monotonic() - began:.1f} s")
    assert [member.status().me.incarnation for member in members] == before, "nobody was started again"
    assert any("10.77.9.3" in one for one in members[2].status().addresses)


@pytest.mark.long
def test_nodes_that_know_no_address_meet_and_meet_again_when_all_addresses_change(tmp_path: Path) -> None:
    with nodes_at_switch(tmp_path, seed=False) as (lan, members):
        began = time.monotonic()
        for machine in range(NODES):
            lan.readdress(machine, f"10.77.8.{machine + 1}")
        for machine in range(NODES):
            others = {f"10.77.8.{other + 1}" for other in range(NODES) if other != machine}
            while not others <= lan.talks_to(machine):
                assert time.monotonic() - began < PATIENCE_S, f"{machine} talks to {lan.talks_to(machine)}"
                time.sleep(0.1)
        connected(members, NODES - 1)
        took = time.monotonic() - began
        print(f"\nall addresses are new: all connected after {took:.1f} s")
        assert took < MOVED_S
