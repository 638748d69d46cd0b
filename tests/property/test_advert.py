"""The view is a CRDT: order and repetition of records do not matter."""

from __future__ import annotations

import random
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.advert.messages import ADVERT, HEAD, Advert, Announcement
from protocols.advert.validate import check_advert, check_announcement
from protocols.advert.view import View
from protocols.errors import RemoteProtocolError
from tests.adverts import NOW_MS, advert_of, announcement_of, peer_of, signed
from tests.wire import messages

# A signer writes one content per version, so the content follows from the version.
RECORDS = [
    record
    for number in (1, 2, 3)
    for incarnation in (1, 2)
    for sequence in (1, 2, 3)
    for record in (
        signed(number, advert_of(number, incarnation=incarnation, sequence=sequence, max_layers=sequence)),
        signed(number, announcement_of(number, incarnation=incarnation, sequence=sequence, created_ms=sequence)),
    )
]


def state(view: View) -> object:
    return [(domain, peer, e.body) for domain in (ADVERT, HEAD) for peer, e in view.alive(domain, 0.0).items()]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(RECORDS), max_size=20), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_view(records: list[bytes], rng: random.Random) -> None:
    orders = [records, records[::-1], records * 2, rng.sample(records, len(records))]
    views = []
    for order in orders:
        view = View(lambda peer: frozenset({"publish"}))
        for record in order:
            view.accept(record, 0.0, NOW_MS)
        views.append(state(view))
    assert all(view == views[0] for view in views)


@settings(max_examples=200)
@given(messages(Advert) | messages(Announcement))
def test_any_body_is_checked_without_another_error(body: Advert | Announcement) -> None:
    with suppress(RemoteProtocolError):
        check_advert(body, peer_of(1)) if isinstance(body, Advert) else check_announcement(body, peer_of(1))
