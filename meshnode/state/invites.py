"""Whether an invite may be redeemed: the one judgement of every ledger."""

from __future__ import annotations

import hashlib
import hmac

from meshnode.core.errors import Declined
from meshnode.membership.port import Invite
from protocols.ids import PeerId, short
from protocols.membership.trust import day


def check_invite(
    invite: Invite | None, secret: bytes, peer: PeerId, wall_ms: int, *, not_before_ms: int, again: bool
) -> Invite:
    """The invite, if `peer` may redeem it now; `again`: it has done so before. See `Ledger.redeem` for the errors."""
    # One sentence for "unknown", "revoked" and "wrong secret": a guesser learns nothing.
    if (
        invite is None
        or invite.revoked_ms
        or not hmac.compare_digest(invite.secret_hash, hashlib.sha256(secret).digest())
    ):
        raise Declined(
            "forbidden",
            "this node has no such invite. It may have been revoked, or made on another node: a ticket is "
            "redeemed at the node that made it",
            peer=peer,
        )
    if invite.expires_ms and invite.expires_ms <= wall_ms:
        raise Declined(
            "invite-expired",
            f"the ticket expired on {day(invite.expires_ms)}; ask for a new one (meshnode invite)",
            peer=peer,
        )
    if not_before_ms and invite.created_ms <= not_before_ms:
        raise Declined(
            "forbidden",
            f"rights of {short(peer)} were withdrawn on {day(not_before_ms)}, after this ticket was made; only a "
            "new ticket can give it new ones",
            peer=peer,
        )
    if not again and invite.used_up:
        times = "once" if invite.uses == 1 else f"{invite.uses} times"
        raise Declined(
            "invite-used",
            f"the ticket was used {times}, which is all it allows; ask for a new one (meshnode invite)",
            peer=peer,
        )
    return invite
