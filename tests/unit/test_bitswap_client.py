"""The asking machine, event by event: windows, spreading, re-asking, end game, bans."""

from __future__ import annotations

from collections.abc import Iterable

from protocols.bitswap import client as c
from protocols.bitswap.ledger import MAX_WINDOW_BYTES
from protocols.bitswap.messages import Entry, PresenceType, WantType
from protocols.bitswap.stalls import DOUBT_S, MAX_STRIKES, MAX_SURPLUS, RETRY_LACK_S, STALL_S, TRUST_S
from protocols.ids import PeerId
from tests.trees import numbered_cid as cid

A, B, D = PeerId("A"), PeerId("B"), PeerId("D")
MIB = 1 << 20


def wishes(effects: Iterable[object], peer: PeerId) -> list[Entry]:
    return [e for f in effects if isinstance(f, c.Send) and f.peer == peer for e in f.message.entries]


def asked(effects: Iterable[object], peer: PeerId) -> list[int]:
    return [int.from_bytes(e.cid[4:], "big") for e in wishes(effects, peer) if not e.cancel]


def cancelled(effects: Iterable[object], peer: PeerId) -> list[int]:
    return [int.from_bytes(e.cid[4:], "big") for e in wishes(effects, peer) if e.cancel]


def start(*peers: PeerId, blocks: int = 100) -> tuple[c.Client, list[object]]:
    client, out = c.Client(), []
    client.handle(c.Offer(1, peers), 0.0)
    for peer in peers:
        client.handle(c.PeerUp(peer), 0.0)
    out += client.handle(c.Want(1, {cid(i): MIB for i in range(blocks)}), 0.0)
    return client, out


def deliver(client: c.Client, peer: PeerId, number: int, now: float) -> list[object]:
    return list(client.handle(c.Arrived(peer, [(cid(number), bytes(MIB))]), now))


def finish(client: c.Client, peer: PeerId, owed: list[int], now: float) -> set[int]:
    """Deliver everything the peer is asked until it is asked nothing more."""
    came = set()
    while owed:
        now += 0.01
        came.add(owed[0])
        owed += asked(deliver(client, peer, owed.pop(0), now), peer)
    return came


def test_first_window_is_asked_in_order_and_marked_full() -> None:
    _, out = start(A)
    assert asked(out, A) == [0, 1, 2, 3]
    sent = [f for f in out if isinstance(f, c.Send)]
    assert sent[0].message.full and all(e.send_dont_have for e in sent[0].message.entries)


def test_a_further_peer_is_asked_for_other_blocks_when_the_first_brings_little() -> None:
    client, out = start(A, B)
    assert (asked(out, A), asked(out, B)) == ([0, 2, 3, 4], [1])  # one block, to get to know it
    assert client.deadline is not None and client.deadline < 0.1
    out = client.handle(c.Tick(), client.deadline)
    assert (asked(out, A), asked(out, B)) == ([], [5, 6, 7])


def test_a_peer_that_is_spared_is_not_asked_for_what_another_owes() -> None:
    client, out = start(A, B, blocks=400)
    owed, now, got = asked(out, A), 0.0, 0
    assert asked(out, B) == [1]
    assert asked(deliver(client, B, 1, 0.001), B) == []
    while now < 0.04:
        now += 0.003
        got += 1
        out = deliver(client, A, owed.pop(0), now)
        owed += asked(out, A)
        assert asked(out, B) == []
    assert got > 10


def test_window_follows_the_measured_rate() -> None:
    client, out = start(A, blocks=400)
    owed, now = asked(out, A), 0.0
    for _ in range(60):
        now += 0.01  # 100 MiB/s
        out = deliver(client, A, owed.pop(0), now)
        owed += asked(out, A)
    assert client.owed(A) <= MAX_WINDOW_BYTES
    assert len(owed) > 8
    for _ in range(12):
        now += 2.0  # half a MiB per second
        owed += asked(deliver(client, A, owed.pop(0), now), A)
    assert len(owed) <= 12  # nothing new until the window has shrunk to one block
    while len(owed) > 1:
        now += 2.0
        owed += asked(deliver(client, A, owed.pop(0), now), A)
    assert client.owed(A) == MIB


def test_dont_have_is_asked_elsewhere_and_cancelled_when_it_came() -> None:
    client, out = start(A, B, blocks=2)
    assert (asked(out, A), asked(out, B)) == ([0], [1])
    out = client.handle(c.Arrived(A, [], [(cid(0), PresenceType.DONT_HAVE)]), 0.1)
    assert asked(out, B) == [0]
    out = deliver(client, B, 0, 0.2)
    assert cancelled(out, A) == [0]  # the wish was still open there
    assert [f.cid for f in out if isinstance(f, c.Got)] == [cid(0)]


def test_a_block_that_nobody_has_is_asked_again_later() -> None:
    client, _ = start(A, blocks=1)
    out = client.handle(c.Arrived(A, [], [(cid(0), PresenceType.DONT_HAVE)]), 0.1)
    assert asked(out, A) == []
    assert client.deadline is not None and client.deadline <= 0.1 + RETRY_LACK_S
    assert client.asked(1) == {A: "does not have it"}
    assert asked(client.handle(c.Tick(), 0.1 + RETRY_LACK_S), A) == [0]


def test_blocks_of_a_lost_peer_go_to_the_next() -> None:
    client, out = start(A, B, blocks=8)
    out += client.handle(c.PeerDown(A), 0.1)
    assert finish(client, B, asked(out, B), 0.1) == set(range(8))


def test_silence_is_a_stall_then_the_peer_is_given_up() -> None:
    client, _ = start(A, blocks=2)
    now, stalls = 0.0, []
    while not any(s.given_up for s in stalls):
        assert client.deadline is not None
        now = client.deadline
        stalls += [f for f in client.handle(c.Tick(), now) if isinstance(f, c.Stalled)]
        assert now < 60
    assert len(stalls) == MAX_STRIKES
    assert client.owed(A) == 0
    assert asked(client.handle(c.PeerUp(A), now), A) == [0, 1]


def test_progress_keeps_a_slow_peer() -> None:
    client, _ = start(A, blocks=2)
    for second in range(1, 30):
        client.handle(c.Progress(A), float(second))
        assert not [f for f in client.handle(c.Tick(), float(second)) if isinstance(f, c.Stalled)]


def test_wrong_bytes_ban_the_peer_with_the_reason() -> None:
    client, first = start(A, B, blocks=8)
    out = client.handle(c.Arrived(A, [(cid(999), b"lie")]), 0.1)
    assert not [f for f in out if isinstance(f, c.Banned)]
    assert finish(client, B, asked([*first, *out], B), 0.1) == set(range(8)), "nobody waits for the judgement"
    assert client.deadline == 0.1 + DOUBT_S
    assert [f for f in client.handle(c.Tick(), 0.1 + DOUBT_S) if isinstance(f, c.Banned)] == [
        c.Banned(A, "sent 3 bytes that hash to no block it was asked for")
    ]
    client.handle(c.PeerUp(A), 1.0)
    assert client.owed(A) == 0
    assert client.asked(1)[A].startswith("dropped, it sent 3 bytes")


def test_an_unknown_hash_bans_too() -> None:
    client, _ = start(A, blocks=1)
    assert [type(f) for f in client.handle(c.Arrived(A, [(None, b"x")]), 0.1)] == [c.Banned]


def test_who_is_in_doubt_and_sends_what_it_owes_is_asked_again() -> None:
    """The strange block was meant for somebody else: for our former self, or for a copy of this node."""
    client, out = start(A, blocks=8)
    owed = asked(out, A)
    client.handle(c.Arrived(A, [(cid(999), b"meant for another")]), 0.1)
    out = deliver(client, A, owed[0], 0.2)
    assert [f for f in out if isinstance(f, c.Got)]
    out += client.handle(c.Tick(), 0.1 + DOUBT_S)
    assert not [f for f in out if isinstance(f, c.Banned)]
    assert finish(client, A, asked(out, A), 3.0) == set(range(8)) - {owed[0]}
    assert client.banned == {}


def test_blocks_that_come_when_nothing_is_owed_accuse_nobody() -> None:
    client, out = start(A, blocks=4)
    assert finish(client, A, asked(out, A), 0.1) == set(range(4))
    client.handle(c.Close(1), 1.0)
    out = []
    for number in range(900, 900 + MAX_SURPLUS):
        out += deliver(client, A, number, 2.0)
    out += client.handle(c.Tick(), 60.0)
    assert out == [] and client.banned == {}
    assert client.wasted_bytes == MAX_SURPLUS * MIB


def test_a_peer_that_goes_away_in_doubt_is_not_accused() -> None:
    client, _ = start(A, blocks=8)
    client.handle(c.Arrived(A, [(cid(999), b"meant for another")]), 0.1)
    client.handle(c.PeerDown(A), 0.2)
    assert not client.handle(c.Tick(), 10.0)


def test_nobody_is_accused_while_another_node_has_our_key() -> None:
    client, _ = start(A, B, blocks=8)
    client.handle(c.Arrived(A, [(cid(999), b"meant for the copy")]), 0.1)
    client.handle(c.Tick(), 0.1 + DOUBT_S)
    assert list(client.banned) == [A]
    client.handle(c.Contested(), 5.0)
    assert client.banned == {}
    client.handle(c.PeerUp(A), 6.0)
    for moment in (7.0, 8.0, 9.0):
        client.handle(c.Arrived(A, [(cid(999), b"meant for the copy")]), moment)
        client.handle(c.Tick(), moment + DOUBT_S)
    assert client.banned == {}
    now = 5.0 + TRUST_S + 1
    client.handle(c.PeerUp(A), now)
    client.handle(c.Want(2, {cid(50): MIB}), now)
    client.handle(c.Offer(2, (A,)), now)
    client.handle(c.Arrived(A, [(cid(999), b"a lie")]), now + 0.1)
    client.handle(c.Tick(), now + 0.1 + DOUBT_S)
    assert list(client.banned) == [A]


def test_repeated_blocks_are_tolerated_up_to_a_limit() -> None:
    client, _ = start(A, blocks=1)
    deliver(client, A, 0, 0.1)
    for _ in range(MAX_SURPLUS):
        assert deliver(client, A, 0, 0.2) == []
    assert client.wasted_bytes == MAX_SURPLUS * MIB
    assert [type(f) for f in deliver(client, A, 0, 0.3)] == [c.Banned]


def test_end_game_asks_the_fast_peer_for_what_the_slow_one_owes() -> None:
    client, out = start(A, B, blocks=12)
    slow, fast, now = asked(out, A), asked(out, B), 0.0
    came: list[int] = []
    while len(came) < 12:
        if fast:
            now += 0.02
            came.append(fast.pop(0))
            out = deliver(client, B, came[-1], now)
            assert cancelled(out, A) == ([came[-1]] if came[-1] in slow else [])
        else:
            assert client.deadline is not None and now < STALL_S
            now = max(now, client.deadline)
            out = client.handle(c.Tick(), now)
        fast += asked(out, B)
        assert not asked(out, A)
    assert now < 1
    assert not [f for f in deliver(client, A, slow[0], now + 0.02) if isinstance(f, c.Got | c.Banned)]
    assert client.wasted_bytes == MIB


def test_equal_peers_get_no_duplicates() -> None:
    client, out = start(A, B, blocks=40)
    owed = {A: asked(out, A), B: asked(out, B)}
    now, total = 0.0, 0
    while owed[A] or owed[B]:
        now += 0.005
        for peer in (A, B):
            if owed[peer]:
                total += 1
                out = deliver(client, peer, owed[peer].pop(0), now)
                for other in (A, B):
                    owed[other] += asked(out, other)
    assert (total, client.wasted_bytes) == (40, 0)


def test_uncertain_peers_are_asked_whether_they_have_it() -> None:
    client = c.Client()
    client.handle(c.PeerUp(D), 0.0)
    client.handle(c.Offer(1, (D,), certain=False), 0.0)
    out = client.handle(c.Want(1, {cid(0): MIB, cid(1): MIB}), 0.0)
    assert {e.want_type for e in wishes(out, D)} == {WantType.HAVE}
    out = client.handle(c.Arrived(D, [], [(cid(0), PresenceType.HAVE)]), 0.1)
    assert asked(out, D) == [0, 1]
    assert {e.want_type for e in wishes(out, D)} == {WantType.BLOCK}


def test_sessions_share_a_peer_and_closing_one_cancels_only_its_own() -> None:
    client = c.Client()
    client.handle(c.PeerUp(A), 0.0)
    client.handle(c.Offer(1, (A,)), 0.0)
    client.handle(c.Offer(2, (A,)), 0.0)
    client.handle(c.Want(1, {cid(0): MIB}), 0.0)
    client.handle(c.Want(2, {cid(0): MIB, cid(9): MIB}), 0.0)
    assert cancelled(client.handle(c.Close(1), 0.1), A) == []
    out = deliver(client, A, 0, 0.2)
    assert [f.sessions for f in out if isinstance(f, c.Got)] == [(2,)]
    assert cancelled(client.handle(c.Close(2), 0.3), A) == [9]
    assert client.owed(A) == 0
    assert client.deadline is None


def test_a_new_session_starts_while_another_is_long() -> None:
    client, out = start(A)
    client.handle(c.Offer(2, (A,)), 0.0)
    client.handle(c.Want(2, {cid(500): MIB}), 0.0)
    owed = asked(out, A)
    for count in range(1, 6):
        out = deliver(client, A, owed.pop(0), count / 10)
        owed += asked(out, A)
        if 500 in owed:
            return
    raise AssertionError("the second session waits for the whole first one")


def test_a_block_found_elsewhere_is_delivered_and_taken_back_from_peers() -> None:
    client, _ = start(A, blocks=6)
    assert client.unasked(1, 10) == (cid(4), cid(5))
    assert client.unasked(1, 1) == (cid(4),)
    assert client.unasked(2, 10) == ()
    out = client.handle(c.Found(cid(0), b"data"), 1.0)
    assert out[0] == c.Got((1,), cid(0), b"data", None)
    assert cancelled(out, A) == [0]
    assert [f for f in client.handle(c.Found(cid(0), b"data"), 1.0) if isinstance(f, c.Got)] == []
    late = deliver(client, A, 0, 1.1)  # it was under way
    assert not any(isinstance(f, c.Got | c.Banned) for f in late)
    assert client.handle(c.Found(cid(5), b"data"), 1.2)[0] == c.Got((1,), cid(5), b"data", None)
    assert finish(client, A, [1, 2, 3, 4], 2.0) == {1, 2, 3, 4}
    assert client.deadline is None


def test_nothing_is_kept_about_a_peer_that_is_forgotten() -> None:
    client, out = start(A, B, blocks=4)
    assert {*asked(out, A), *asked(out, B)} == {0, 1, 2, 3}
    client.handle(c.Misbehaved(A, "broke the protocol"), 1.0)
    client.handle(c.Forget(A), 1.0)
    client.handle(c.Forget(B), 1.0)
    assert client.banned == {} and client._peers == {}
    again = client.handle(c.PeerUp(A), 2.0)
    assert sorted(asked(again, A)) == [0, 1, 2, 3]
