"""Copies of files: whatever nodes hold and whenever they evict, a copy stays, and nobody fetches in vain."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.policy.replication import Shelf, Standing, assignments, copies, ranked, standing
from protocols.ids import PeerId

PEERS = tuple(PeerId(f"peer-{n}") for n in range(7))
FILES = tuple(bytes([1, 0x55, 0x12, 0x20, n]) * 8 for n in range(9))

peers = st.sets(st.sampled_from(PEERS), min_size=1)
shelves_of = st.dictionaries(
    st.sampled_from(PEERS),
    st.tuples(st.frozensets(st.sampled_from(FILES)), st.integers(0, 60), st.booleans()),
    min_size=1,
).map(lambda rows: [Shelf(peer, *row) for peer, row in sorted(rows.items())])
sizes_of = st.fixed_dictionaries({cid: st.integers(0, 20) for cid in FILES})
replicas_of = st.integers(1, 4)


@given(holders=peers, replicas=replicas_of, cid=st.sampled_from(FILES))
def test_all_who_may_evict_at_once_leave_enough(holders: set[PeerId], replicas: int, cid: bytes) -> None:
    """Everybody looks, then everybody evicts: nobody sees what the others do meanwhile."""
    view = {peer: standing(cid, peer, holders - {peer}, replicas) for peer in holders}
    kept = {peer for peer, what in view.items() if what is not Standing.FREE}
    assert len(kept) == min(replicas, len(holders))
    assert sum(what is Standing.LAST for what in view.values()) == 1


@given(holders=peers, replicas=replicas_of, cid=st.sampled_from(FILES), data=st.data())
def test_with_different_views_of_living_holders_one_copy_stays(
    holders: set[PeerId], replicas: int, cid: bytes, data: st.DataObject
) -> None:
    """Each knows of some of the others only."""
    views = {
        peer: data.draw(st.sets(st.sampled_from(sorted(holders - {peer}))) if holders - {peer} else st.just(set()))
        for peer in sorted(holders)
    }
    assert any(standing(cid, peer, others, replicas) is Standing.LAST for peer, others in views.items())


@settings(max_examples=200)
@given(shelves=shelves_of, sizes=sizes_of, replicas=replicas_of, data=st.data())
def test_an_assignment_is_what_is_missing_and_fits(
    shelves: list[Shelf], sizes: dict[bytes, int], replicas: int, data: st.DataObject
) -> None:
    plan = assignments(sizes, shelves, replicas)
    assert plan == assignments(sizes, data.draw(st.permutations(shelves)), replicas), "everybody computes the same"
    before = copies(sizes, shelves)
    by_peer = {shelf.peer: shelf for shelf in shelves}
    for peer, cids in plan.items():
        assert sum(sizes[cid] for cid in cids) <= by_peer[peer].room_bytes
        assert not by_peer[peer].files & set(cids)
        assert len(cids) == len(set(cids))
        assert [before[cid] for cid in cids] == sorted(before[cid] for cid in cids), "the rarest first"
    wanted = min(replicas, len(shelves))
    for cid in FILES:
        after = before[cid] + sum(cid in cids for cids in plan.values())
        assert after <= max(wanted, before[cid])
        if after < wanted:  # then nobody has room for it, after what is rarer
            free = {p: s.room_bytes - sum(sizes[c] for c in plan.get(p, [])) for p, s in by_peer.items()}
            able = [p for p, s in by_peer.items() if cid not in s.files and cid not in plan.get(p, [])]
            assert all(free[p] < sizes[cid] for p in able)


@given(shelves=shelves_of, sizes=sizes_of, replicas=replicas_of)
def test_whoever_is_late_is_stood_in_for(shelves: list[Shelf], sizes: dict[bytes, int], replicas: int) -> None:
    """With a round of lateness for every file, whoever had a part keeps it, as far as there is room."""
    roomy = [Shelf(s.peer, s.files, 1 << 20, s.steady) for s in shelves]
    first = assignments(sizes, roomy, replicas)
    later = assignments(sizes, roomy, replicas, dict.fromkeys(sizes, 1))
    for peer, cids in first.items():
        assert set(cids) <= set(later[peer])
    for cid in FILES:
        before, after = (sum(cid in cids for cids in plan.values()) for plan in (first, later))
        others = [s for s in roomy if cid not in s.files]
        assert after == (min(before + 1, len(others)) if before else 0)


@given(holders=peers, cid=st.sampled_from(FILES))
def test_a_peer_more_or_less_moves_no_other_rank(holders: set[PeerId], cid: bytes) -> None:
    order = ranked(cid, holders)
    for gone in holders:
        assert ranked(cid, holders - {gone}) == [peer for peer in order if peer != gone]
