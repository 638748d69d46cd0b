"""The DHT under random messages, damaged bytes and random answers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.ids import PeerId, base58_encode
from protocols.kad import lookup as kad
from protocols.kad.messages import (
    Kind,
    Peer,
    place,
    place_of,
)
from tests.property.test_wire import peers

few_ids = st.integers(0, 60).map(lambda n: PeerId(base58_encode(b"\x12\x20" + n.to_bytes(32, "big"))))


US = PeerId(base58_encode(b"\x12\x20" + bytes([255] * 32)))
KEY = b"\x12\x20" + bytes([1] * 32)


@given(peers(few_ids), st.data(), st.sampled_from((Kind.FIND_NODE, Kind.GET_PROVIDERS)))
@settings(max_examples=120)
def test_any_walk_ends_within_its_limits(seeds: tuple[Peer, ...], data: st.DataObject, kind: Kind) -> None:
    """Any answers, failures, silence and passing of time, in any order."""
    walk = kad.Lookup(kind, KEY, US, 0.0)
    now, asked, found = 0.0, [], []
    under_way: list[PeerId] = []
    done: list[kad.Done] = []

    def take(effects: tuple[object, ...]) -> None:
        for effect in effects:
            if isinstance(effect, kad.Ask):
                asked.append(effect.peer.id)
                under_way.append(effect.peer.id)
                assert effect.peer.addresses and effect.peer.id != US
            elif isinstance(effect, kad.Found):
                found.append(effect.provider.id)
            elif isinstance(effect, kad.Done):
                done.append(effect)

    take(walk.handle(kad.Begin(seeds), now))
    assert len(under_way) <= kad.ALPHA
    while not walk.over:
        assert walk.deadline is not None and now <= walk.deadline <= kad.LOOKUP_S
        assert len(under_way) <= kad.MAX_UNDER_WAY and len(walk._candidates) <= kad.MAX_CANDIDATES
        what = data.draw(st.sampled_from(("answer", "fail", "wait")))
        if what == "wait" or not under_way:
            now = walk.deadline
            take(walk.handle(kad.Tick(), now))
            continue
        one = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        if what == "fail":
            take(walk.handle(kad.Failed(one), now))
        else:
            take(walk.handle(kad.Answered(one, data.draw(peers(few_ids)), data.draw(peers(few_ids))), now))
    assert len(done) == 1 and walk.deadline is None
    assert len(set(asked)) == len(asked) <= kad.MAX_ASKED
    assert len(set(found)) <= kad.MAX_FOUND
    distances = [place_of(peer.id) ^ place(KEY) for peer in done[0].closest]
    assert distances == sorted(distances) and len(distances) <= kad.K
