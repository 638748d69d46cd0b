"""Who may open another session on a stage: floods, hogs, probes and newcomers."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from meshnode.policy.shares import PROBE_SESSIONS, PROBE_TOKENS, SILENT_S, Held, Room, victim, why_refused
from protocols.ids import PeerId

A, B, C = (PeerId(name) for name in "abc")
ROOM = Room(sessions=8, kv_bytes=8000)


def session(origin: PeerId, *, kv: int = 100, capacity: int = 100, silent: float = 0.0) -> Held:
    return Held(origin, capacity, kv, silent)


def probe(origin: PeerId) -> Held:
    return session(origin, capacity=PROBE_TOKENS, kv=4)


def filled(*origins: PeerId, room: Room = ROOM, kv: int = 100) -> list[Held]:
    """What is open after these have asked for sessions, one after the other, until nobody gets another one."""
    held: list[Held] = []
    while True:
        taken = [o for o in origins if not why_refused(session(o, kv=kv), held, room)]
        if not taken:
            return held
        for origin in taken:
            if not why_refused(session(origin, kv=kv), held, room):
                held.append(session(origin, kv=kv))


def count(held: list[Held], origin: PeerId) -> int:
    return sum(h.origin == origin for h in held)


def test_a_hog_leaves_rooms_for_newcomers() -> None:
    held = filled(A)
    assert count(held, A) == 6
    for origin in (B, C):
        assert not why_refused(session(origin), held, ROOM)
        held.append(session(origin))
    assert why_refused(session(PeerId("d")), held, ROOM) == "all 8 sessions are taken"


def test_two_that_ask_without_end_share() -> None:
    held = filled(A, B)
    assert abs(count(held, A) - count(held, B)) <= 1
    assert len(held) == 6


def test_who_held_everything_gets_no_more_once_another_one_asks() -> None:
    held = [*filled(A), session(B)]
    held.remove(session(A))
    held.remove(session(A))
    assert "4 of 8 sessions are yours" in why_refused(session(A), held, ROOM)
    assert not why_refused(session(B), held, ROOM)


def test_memory_is_shared_like_sessions() -> None:
    held = filled(A, kv=2500)
    assert sum(h.kv_bytes for h in held) <= 7000
    assert "memory" in why_refused(session(A, kv=2500), held, ROOM)
    assert not why_refused(session(B, kv=2500), held, ROOM), "the engine knows whether it fits"
    assert not why_refused(session(A, kv=8000), [], ROOM), "alone, one session may have it all"


def test_a_stage_of_one_session_serves_whoever_comes() -> None:
    one = Room(sessions=1, kv_bytes=1000)
    assert not why_refused(session(A), [], one)
    assert why_refused(session(B), [session(A)], one) == "all 1 sessions are taken"


def test_probes_pass_a_full_stage_and_cannot_fill_it() -> None:
    held = [*filled(A, B), *(session(PeerId(f"p{i}")) for i in range(2))]
    assert len(held) == ROOM.sessions
    for i in range(PROBE_SESSIONS):
        assert not why_refused(probe(PeerId(f"q{i}")), held, ROOM)
        held.append(probe(PeerId(f"q{i}")))
        assert "one of each node" in why_refused(probe(PeerId(f"q{i}")), held, ROOM)
    assert "probes" in why_refused(probe(C), held, ROOM)
    assert not why_refused(session(C), [probe(A)] * PROBE_SESSIONS, ROOM), "probes take no session"


def test_the_first_session_of_an_origin_takes_the_place_of_a_silent_one() -> None:
    talking = [session(A)] * 5
    held = [*talking, session(A, silent=SILENT_S), session(B, silent=9 * SILENT_S)]
    gone = victim(session(C), held)
    assert gone is held[5], "of whoever holds most"
    assert victim(session(A), held) is None, "nobody makes room for his own next one"
    assert victim(session(C), talking) is None
    assert victim(probe(C), held) is None
    assert victim(session(C), [replace(session(A), silent_s=SILENT_S - 0.1)]) is None


@given(
    asked=st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, 5000)), max_size=40),
    sessions=st.integers(1, 16),
)
def test_no_order_of_questions_fills_a_stage_with_one_origin(asked: list[tuple[str, int]], sessions: int) -> None:
    room = Room(sessions=sessions, kv_bytes=8000)
    held: list[Held] = []
    for name, kv in asked:
        wanted = session(PeerId(name), kv=kv)
        if not why_refused(wanted, held, room):
            held.append(wanted)
        assert len(held) <= sessions
    if sessions >= 4 and len({h.origin for h in held}) == 1:
        assert not why_refused(session(PeerId("new")), held, room)
