"""The answering machine: presences, priorities, cancels, fairness, wishes that wait."""

from __future__ import annotations

from protocols.bitswap.messages import Entry, Message, PresenceType, WantType
from protocols.bitswap.server import GUEST_ANSWERS, MAX_WANTS, UNDER_WAY, Answer, Server
from protocols.ids import PeerId
from tests.trees import numbered_cid as cid

A, B = PeerId("A"), PeerId("B")
MIB = 1 << 20


def wants(*numbers: int, **fields: object) -> Message:
    return Message(entries=tuple(Entry(cid=cid(n), **fields) for n in numbers))  # type: ignore[arg-type]


def drain(server: Server) -> list[Answer]:
    out = []
    while (answer := server.next()) is not None:
        out.append(answer)
        server.done(answer.peer)
    return out


def test_blocks_come_one_mib_at_a_time_highest_priority_first() -> None:
    server = Server(lambda _: MIB)
    server.handle(A, wants(1, 2))
    server.handle(A, wants(3, priority=9))
    answers = drain(server)
    assert [a.blocks for a in answers] == [(cid(3),), (cid(1),), (cid(2),)]
    assert [a.pending_bytes for a in answers] == [2 * MIB, MIB, 0]


def test_small_blocks_share_a_message() -> None:
    server = Server(lambda _: 9000)
    server.handle(A, wants(*range(20)))
    assert [len(a.blocks) for a in drain(server)] == [20]


def test_presences() -> None:
    server = Server({cid(1): MIB, cid(2): 100}.get)
    server.handle(A, wants(1, 2, 3, want_type=WantType.HAVE, send_dont_have=True))
    server.handle(A, wants(4, send_dont_have=True))
    server.handle(A, wants(5))  # did not ask to be told
    (answer,) = drain(server)
    assert answer.blocks == (cid(2),)  # smaller than a presence is worth
    assert dict(answer.presences) == {
        cid(1): PresenceType.HAVE,
        cid(3): PresenceType.DONT_HAVE,
        cid(4): PresenceType.DONT_HAVE,
    }


def test_a_wish_waits_until_the_block_is_here() -> None:
    held: dict[bytes, int] = {}
    server = Server(held.get)
    server.handle(A, wants(1))
    assert drain(server) == []
    held[cid(1)] = MIB
    assert server.added([cid(1), cid(2)])
    assert [a.blocks for a in drain(server)] == [(cid(1),)]
    assert not server.added([cid(1)])


def test_cancel_and_full() -> None:
    server = Server(lambda _: MIB)
    server.handle(A, wants(1, 2, 3))
    server.handle(A, wants(2, cancel=True))
    assert server.waiting(A) == 2 * MIB
    server.handle(A, Message(entries=(Entry(cid=cid(7)),), full=True))
    assert [a.blocks for a in drain(server)] == [(cid(7),)]
    assert server.waiting(A) == 0


def test_a_peer_that_wants_everything_does_not_starve_another() -> None:
    server = Server(lambda _: MIB)
    server.handle(A, wants(*range(50)))
    for _ in range(10):
        server.next()
        server.done(A)
    server.handle(B, wants(100, 101))
    order = [a.peer for a in drain(server)][:6]
    assert order.count(B) == 2


def test_favoured_peers_come_first() -> None:
    server = Server(lambda _: MIB, favours=lambda peer: peer == B)
    for peer in (A, B):
        server.handle(peer, wants(1, 2, 3))
    assert [answer.peer for answer in drain(server)] == [B] * 3 + [A] * 3


def test_a_slow_peer_holds_no_more_than_two_answers() -> None:
    server = Server(lambda _: MIB)
    server.handle(A, wants(*range(10)))
    server.handle(B, wants(*range(10)))
    taken = [server.next() for _ in range(2 * UNDER_WAY)]
    assert sorted(a.peer for a in taken if a) == [A] * UNDER_WAY + [B] * UNDER_WAY
    assert server.next() is None
    server.done(B)
    answer = server.next()
    assert answer is not None and answer.peer == B


def test_slow_peers_that_are_not_favoured_leave_room_for_the_others() -> None:
    """A reader that takes nothing holds its answers for a minute, and strangers are many."""
    server = Server(lambda _: MIB, favours=lambda peer: peer == A)
    for number in range(GUEST_ANSWERS):
        server.handle(PeerId(f"stranger {number}"), wants(1, 2, 3))
    taken = []
    while (answer := server.next()) is not None:
        taken.append(answer)
    assert len(taken) == GUEST_ANSWERS
    server.handle(A, wants(1))
    member = server.next()
    assert member is not None and member.peer == A
    server.done(taken[0].peer)
    further = server.next()
    assert further is not None and further.peer != A


def test_flood_is_bounded() -> None:
    server = Server(lambda _: MIB)
    for start in range(0, 3 * MAX_WANTS, 1000):
        server.handle(A, wants(*range(start, start + 1000)))
    assert server.waiting(A) == MAX_WANTS * MIB
    for number in range(3 * MAX_WANTS):
        server.handle(A, wants(number % MAX_WANTS, cancel=True))
        server.handle(A, wants(number % MAX_WANTS))
    assert server.waiting(A) == MAX_WANTS * MIB
    assert len(server._peers[A].ready) <= 3 * MAX_WANTS + 2
    server.gone(A)
    assert server.next() is None
