"""Where to look for peers: what the owner has named, and where members were met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from meshnode.core.clock import Wall
from meshnode.state.port import Peers
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.membership.ticket import peer_of

MAX_ADDRESSES: Final = 16  # of one peer


class AddressBook:
    """Addresses of one run of the node; what is new is kept for the next one."""

    def __init__(
        self,
        peers: Peers,
        seeds: Sequence[str],
        wall: Wall,
        was_put_out: Callable[[PeerId], bool] = lambda peer: False,
    ) -> None:
        """
        Args:
          peers: where peers were met before; addresses that worked are added.
          seeds: multiaddrs of bootstrap peers and of the ticket, with /p2p/<peer id>.
          was_put_out: of members that lost their membership: who is met no more is forgotten.
        """
        self._peers = peers
        self._wall = wall
        self._was_put_out = was_put_out
        self._met: dict[PeerId, tuple[str, ...]] = dict(peers.known_peers())
        self._kept: dict[PeerId, tuple[str, ...]] = {}  # what was written in this run
        self.seeds: dict[PeerId, list[str]] = {}
        self.wrong: dict[str, str] = {}  # seeds that can't be read, and why
        for address in seeds:
            try:
                self.seeds.setdefault(peer_of(address), []).append(address)
            except RemoteProtocolError as error:
                self.wrong[address] = str(error)

    def known(self) -> Mapping[PeerId, Sequence[str]]:
        """Addresses by peer, the best first."""
        for peer in [peer for peer in self._met if self._was_put_out(peer)]:
            self._peers.forget_peer(peer)
            del self._met[peer]
            self._kept.pop(peer, None)
        out = {peer: list(addresses) for peer, addresses in self.seeds.items()}
        for peer, addresses in self._met.items():
            out.setdefault(peer, []).extend(addresses)
        return out

    def answered(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """A dial has succeeded at one of these."""
        self._peers.remember_peer(peer, addresses, self._wall())

    def says(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """A connected member says that it is found there: after a restart we must find those that once found us."""
        said = tuple(addresses[:MAX_ADDRESSES])
        if said and self._kept.get(peer) != said and not self._was_put_out(peer):
            self._peers.remember_peer(peer, said, self._wall())
            self._kept[peer] = said
            self._met[peer] = tuple(dict.fromkeys((*said, *self._met.get(peer, ()))))[:MAX_ADDRESSES]
