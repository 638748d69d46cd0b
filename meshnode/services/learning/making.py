"""What becomes of a lesson that is over: whoever's turn it is makes the adapter and proposes it.

The turn is drawn from the lesson, so nobody chooses it, and nobody has to agree: the next one steps in when nothing
has come for a while, or when what came was refused.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from typing import Final

import trio

from meshnode.core.errors import Declined
from meshnode.core.log import get_logger
from meshnode.model.adapter import build_adapter
from meshnode.services.learning.book import Book, Page
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.worker import Study
from meshnode.services.port import Proposals
from protocols.ids import Cid, PeerId, short

TURN_S: Final = 60.0  # for each that comes before us
RETRY_S: Final = 30.0  # after a proposal that could not be made now

_log = get_logger("learning")


def place(us: PeerId, participants: Collection[PeerId], lesson: Cid) -> int:
    """How many come before us."""

    def draw(peer: PeerId) -> bytes:
        return sha256(f"meshnode/propose/1:{lesson}:{peer}".encode()).digest()

    return sorted({us, *participants}, key=draw).index(us)


async def make_adapter(
    ground: Ground, study: Study, book: Book, page: Page, proposals: Proposals, participants: Collection[PeerId]
) -> None:
    """Wait for our turn, and make and propose the adapter unless somebody did. What was made is in the page then.

    Raises DiskError, ModelError; Declined when this node may not propose.
    """
    frame = study.frame
    await trio.sleep(TURN_S * place(ground.us, participants, study.cid))
    if proposals.proposed(frame.cid):
        return
    adapter = await ground.workers.run(_build, ground, study, page)
    while True:
        try:
            proposals.propose(adapter, frame.base, frame.cid, round=page.published, parents=_parents(page))
            break
        except Declined as error:
            if error.code != "not-ready":  # the network serves nothing yet
                raise
            await trio.sleep(RETRY_S)
    page.adapter = adapter
    await ground.workers.run(book.write, page)
    _log.info("learning.proposed", adapter=short(adapter))


def _build(ground: Ground, study: Study, page: Page) -> Cid:
    return build_adapter(
        study.frame, page.vector, ground.store, version=max(0, page.published), pin=f"adapter-{study.frame.cid}"
    )


def _parents(page: Page) -> tuple[str, ...]:
    return (page.parent,) if page.parent else ()
