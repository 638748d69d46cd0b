"""Who is dialled, when, and what is said when it does not work."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.clock import VirtualWall
from meshnode.core.errors import PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.net.port import PeerEvent
from meshnode.services.dialling import (
    ALONE_CAP_S,
    ANEW_S,
    FORGOTTEN_CAP_S,
    KNOWN_CAP_S,
    MAX_PEERS,
    RETRY_CAP_S,
    RETRY_FIRST_S,
    STEADY_S,
    YIELD_S,
    DiallingService,
)
from meshnode.state.address_book import AddressBook
from meshnode.state.database import Database
from protocols.ids import PeerId
from tests.adverts import Known
from tests.unit.membership_actors import peer_of_key

PEERS = sorted(peer_of_key(f"peer {number}") for number in range(80))
SMALL, US, LARGE = PEERS[0], PEERS[40], PEERS[79]
AT_ONCE = 0.3  # seconds


def address_of(peer: PeerId, port: int = 1) -> str:
    return f"/ip4/192.0.2.1/tcp/{port}/p2p/{peer}"


class Dialled:
    """The part of a host that discovery uses: says who was dialled when, connects to whoever is `up`."""

    def __init__(self) -> None:
        self.peer_id = US
        self.addresses = (address_of(US),)
        self.surroundings = Changes()
        self.up: set[str] = set()
        self.dead: set[str] = set()  # addresses that take a dial and say nothing
        self.dials: list[tuple[float, PeerId, tuple[str, ...]]] = []
        self._connected: set[PeerId] = set()
        self._began = trio.current_time()
        self._send, self._receive = trio.open_memory_channel[PeerEvent](1000)
        self._dialled = trio.Event()

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(sorted(self._connected))

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        return self._receive

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        self.dials.append((trio.current_time() - self._began, peer, tuple(addresses)))
        self._dialled.set()
        self._dialled = trio.Event()
        await trio.lowlevel.checkpoint()
        if self.dead & set(addresses):
            await trio.sleep(10)
        if not self.up & set(addresses):
            raise PeerUnreachable(f"{peer} does not answer", peer=peer)
        self.set(peer, True)

    def set(self, peer: PeerId, connected: bool, reason: str = "") -> None:
        (self._connected.add if connected else self._connected.discard)(peer)
        self._send.send_nowait(PeerEvent(peer, connected, reason))

    async def dialled(self, count: int) -> list[float]:
        """The times of the first `count` dials, once they have happened."""
        with trio.fail_after(10_000):
            while len(self.dials) < count:
                await self._dialled.wait()
        return [time for time, _, _ in self.dials[:count]]


class World:
    def __init__(self, database: Database) -> None:
        self.host = Dialled()
        self.database = database
        self.known = Known()
        self.health = Health()
        self.out: set[PeerId] = set()
        self.service: DiallingService


@asynccontextmanager
async def world(
    folder: Path, seeds: Sequence[str] = (), *, remembered: Sequence[PeerId] = ()
) -> AsyncIterator[World]:
    with Database(folder / "state.sqlite") as database:
        for peer in remembered:
            database.remember_peer(peer, [address_of(peer)], 1)
        it = World(database)
        it.service = DiallingService(
            it.host,  # type: ignore[arg-type]  # the part of a Host that is used
            AddressBook(database, seeds, VirtualWall(), it.out.__contains__),
            it.known,
            it.health,
            random.Random(1),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(it.service.run)
            yield it
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("peer", [SMALL, LARGE])
async def test_a_seed_is_dialled_at_once_whoever_is_smaller(
    autojump_clock: MockClock, tmp_path: Path, peer: PeerId
) -> None:
    async with world(tmp_path, [address_of(peer)]) as it:
        it.host.up = {address_of(peer)}
        assert await it.host.dialled(1) < [AT_ONCE]
        await trio.testing.wait_all_tasks_blocked()
        assert it.database.known_peers() == {peer: (address_of(peer),)}
        assert it.service.failures() == {}


async def test_a_new_advert_is_answered_at_once_by_the_smaller_id_and_later_by_the_other(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with world(tmp_path) as it:
        it.host.up = {address_of(LARGE), address_of(SMALL)}
        it.known.set({LARGE: (address_of(LARGE),), SMALL: (address_of(SMALL),)})
        first, second = await it.host.dialled(2)
        assert [peer for _, peer, _ in it.host.dials] == [LARGE, SMALL]
        assert first < AT_ONCE
        assert YIELD_S <= second < YIELD_S + AT_ONCE


async def test_who_was_put_out_is_dialled_no_more(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, remembered=[LARGE, SMALL]) as it:
        await it.host.dialled(4)
        it.out.add(LARGE)
        it.host.set(LARGE, True)
        it.host.set(LARGE, False, "its membership was withdrawn")
        await trio.testing.wait_all_tasks_blocked()
        before = len(it.host.dials)
        await it.host.dialled(before + 5)
        assert {peer for _, peer, _ in it.host.dials[before:]} == {SMALL}
        assert list(it.database.known_peers()) == [SMALL], "nor after a restart"
        assert LARGE not in it.service.failures()


async def test_the_other_side_came_first(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.known.set({SMALL: (address_of(SMALL),)})
        await trio.sleep(YIELD_S / 2)
        it.host.set(SMALL, True)
        await trio.sleep(60)
        assert it.host.dials == []


async def test_retries_grow_apart_and_are_capped(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, [address_of(LARGE)]) as it:
        times = await it.host.dialled(16)
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        for number, pause in enumerate(pauses):
            whole = min(RETRY_CAP_S, RETRY_FIRST_S * 2**number)
            assert whole / 2 <= pause <= whole * 1.5 + AT_ONCE
        assert len({round(pause, 3) for pause in pauses[-6:]}) > 3  # jitter
        assert it.service.failures() == {LARGE: f"{LARGE} does not answer"}
        await trio.testing.wait_all_tasks_blocked()
        it.host.up = {address_of(LARGE)}
        await it.host.dialled(17)
        await trio.testing.wait_all_tasks_blocked()
        assert it.service.failures() == {}


@pytest.mark.parametrize("minutes", [1, 5, 30])
async def test_pauses_stay_short_while_an_outage_lasts(
    autojump_clock: MockClock, tmp_path: Path, minutes: int
) -> None:
    """Also towards who is no seed and was met in this run, and while others are here."""
    async with world(tmp_path) as it:
        it.host.up = {address_of(LARGE), address_of(SMALL)}
        it.known.set({LARGE: (address_of(LARGE),), SMALL: (address_of(SMALL),)})
        await it.host.dialled(2)
        await trio.sleep(STEADY_S + 1)
        it.host.up.clear()
        it.host.dead = {address_of(LARGE)}
        it.host.set(LARGE, False, "no heartbeat for 4 s")
        it.known.set({SMALL: (address_of(SMALL),)})
        await trio.sleep(minutes * 60)
        ended = [when + 10 for when, peer, _ in it.host.dials if peer == LARGE][1:]
        assert ended
        pauses = [later - earlier - 10 for earlier, later in itertools.pairwise(ended)]
        assert max(pauses) <= max(RETRY_CAP_S, minutes * 60 / 400) * 1.5 + AT_ONCE


async def test_all_pauses_begin_anew_when_one_of_the_lost_is_back(autojump_clock: MockClock, tmp_path: Path) -> None:
    away = PEERS[41:]
    async with world(tmp_path, remembered=away) as it:
        await trio.sleep(400)
        before = len(it.host.dials)
        now = trio.current_time() - it.host._began
        it.host.set(away[0], True)  # it has dialled us
        times = await it.host.dialled(before + MAX_PEERS - 1)
        assert times[-1] - now < AT_ONCE
        others = {peer for _, peer, _ in it.host.dials[before:]}
        assert len(others) >= MAX_PEERS - 1
        # A peer that comes and goes does not keep everybody dialling.
        await trio.sleep(ANEW_S - 1)
        it.host.set(away[0], False, "refused")
        it.host.set(away[0], True)
        before = len(it.host.dials)
        await trio.sleep(AT_ONCE)
        assert len(it.host.dials) - before < MAX_PEERS / 2


async def test_all_pauses_begin_anew_when_the_network_of_this_machine_changes(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with world(tmp_path, remembered=[LARGE]) as it:
        it.host.dead = {address_of(LARGE)}
        await trio.sleep(400)
        it.host.dead.clear()
        it.host.up = {address_of(LARGE)}
        it.host.surroundings.notify()
        with trio.fail_after(AT_ONCE):  # also when a dial is under way, which may knock from an address that is gone
            while LARGE not in it.host.peers:
                await it.host._dialled.wait()
                await trio.testing.wait_all_tasks_blocked()


async def test_a_new_address_is_tried_at_once_however_long_the_pause(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with world(tmp_path, [address_of(LARGE)]) as it:
        await it.host.dialled(10)
        before = len(it.host.dials)
        now = trio.current_time() - it.host._began
        it.known.set({LARGE: (address_of(LARGE, 2),)})
        it.host.up = {address_of(LARGE, 2)}
        assert (await it.host.dialled(before + 1))[-1] - now < AT_ONCE
        assert address_of(LARGE, 2) in it.host.dials[-1][2]


async def test_a_lost_connection_is_made_again(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, [address_of(LARGE)]) as it:
        it.host.up = {address_of(LARGE)}
        await it.host.dialled(1)
        await trio.sleep(STEADY_S + 1)
        lost = trio.current_time() - it.host._began
        it.host.set(LARGE, False, "the cable was pulled")
        assert (await it.host.dialled(2))[-1] - lost < AT_ONCE


async def test_connections_that_do_not_last_are_not_hammered(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, [address_of(LARGE)]) as it:
        it.host.up = {address_of(LARGE)}
        for count in range(1, 12):
            await it.host.dialled(count)
            await trio.testing.wait_all_tasks_blocked()
            it.host.set(LARGE, False, "12D3… was refused: it belongs to another network")
            await trio.testing.wait_all_tasks_blocked()
        assert "another network" in it.service.failures()[LARGE]
        times = await it.host.dialled(12)
        assert times[-1] - times[-2] >= KNOWN_CAP_S / 2, "that is no outage"


async def test_peers_met_before_are_found_again_after_a_restart(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, remembered=[LARGE, SMALL]) as it:
        it.host.up = {address_of(LARGE), address_of(SMALL)}
        await it.host.dialled(2)
        assert {peer for _, peer, _ in it.host.dials} == {LARGE, SMALL}


async def test_peers_nobody_speaks_of_are_tried_ever_more_rarely(autojump_clock: MockClock, tmp_path: Path) -> None:
    """But not while nobody at all is here."""
    async with world(tmp_path, remembered=[LARGE]) as it:
        it.host.set(SMALL, True)
        await trio.sleep(80_000)
        times = [when for when, _, _ in it.host.dials]
        assert times[-1] - times[-2] >= FORGOTTEN_CAP_S / 2
        it.host.set(SMALL, False)
        await trio.sleep(1000)
        times = [when for when, _, _ in it.host.dials]
        assert ALONE_CAP_S / 2 <= times[-1] - times[-2] <= ALONE_CAP_S * 1.5 + AT_ONCE


async def test_a_hundred_dead_peers_cost_a_few_dials_a_second(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, remembered=[peer for peer in PEERS if peer != US]) as it:
        await trio.sleep(300)
        before = len(it.host.dials)
        await trio.sleep(100)
        assert len(it.host.dials) - before <= 400


async def test_a_new_address_ends_the_dial_of_the_old_ones(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, [address_of(LARGE)]) as it:
        it.host.dead = {address_of(LARGE)}
        await it.host.dialled(1)
        await trio.sleep(1)
        it.host.dead.clear()
        it.host.up = {address_of(LARGE, 2)}
        it.known.set({LARGE: (address_of(LARGE, 2),)})
        await trio.sleep(AT_ONCE)
        assert LARGE in it.host.peers
        assert it.host.dials[-1][2][0] == address_of(LARGE, 2), "the newest address comes first"


async def test_we_never_dial_ourselves(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, [address_of(US)], remembered=[US]) as it:
        it.known.set({US: (address_of(US),)})
        await trio.sleep(60)
        assert it.host.dials == []


async def test_an_address_without_a_peer_is_named(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, ["/ip4/192.0.2.1/tcp/4331", address_of(LARGE)]) as it:
        await it.host.dialled(1)
        failures = it.service.failures()
        assert "does not end in /p2p/" in failures["/ip4/192.0.2.1/tcp/4331"]


async def test_the_mesh_is_full_up_to_its_limit_and_seeds_come_in_always(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    seed = SMALL
    others = [peer for peer in PEERS if peer not in (US, SMALL)]
    async with world(tmp_path) as it:
        it.host.up = {address_of(peer) for peer in PEERS}
        it.known.set({peer: (address_of(peer),) for peer in others})
        await trio.sleep(60)
        assert len(it.host.peers) == MAX_PEERS
        dialled = len(it.host.dials)
        assert dialled == MAX_PEERS
    async with world(tmp_path / "again", [address_of(seed)]) as it:
        it.host.up = {address_of(peer) for peer in PEERS}
        for peer in others[:MAX_PEERS]:
            it.host.set(peer, True)
        await it.host.dialled(1)
        assert it.host.dials[0][1] == seed


async def test_dead_peers_do_not_hold_up_new_ones(autojump_clock: MockClock, tmp_path: Path) -> None:
    dead = [peer for peer in PEERS if peer not in (US, LARGE)]
    async with world(tmp_path, remembered=dead) as it:
        await it.host.dialled(200)
        now = trio.current_time() - it.host._began
        it.known.set({LARGE: (address_of(LARGE),)})
        with trio.fail_after(5):
            while not any(peer == LARGE for _, peer, _ in it.host.dials):
                await it.host._dialled.wait()
        assert it.host.dials[-1][0] - now < AT_ONCE


async def test_a_lone_first_node_is_told_how_to_invite(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        assert [shown.code for shown in it.health.current()] == ["first-node"]
        it.host.set(LARGE, True)
        await trio.testing.wait_all_tasks_blocked()
        assert it.health.current() == []


@pytest.mark.parametrize("remembered", [True, False])
async def test_who_knows_peers_and_reaches_none_is_told_after_a_while(
    autojump_clock: MockClock, tmp_path: Path, remembered: bool
) -> None:
    async with world(tmp_path, [] if remembered else [address_of(LARGE)], remembered=[LARGE] * remembered) as it:
        await trio.sleep(15)
        assert it.health.current() == []
        await trio.sleep(10)
        (shown,) = it.health.current()
        assert shown.code == "no-peers" and address_of(US) in shown.text
        it.host.set(LARGE, True)
        await trio.testing.wait_all_tasks_blocked()
        assert it.health.current() == []


async def test_nothing_is_done_while_nothing_changes(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, [address_of(LARGE)]) as it:
        it.host.up = {address_of(LARGE)}
        await it.host.dialled(1)
        await trio.testing.wait_all_tasks_blocked()
        before = trio.lowlevel.current_statistics().seconds_to_next_deadline
        assert before > 1000
