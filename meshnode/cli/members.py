"""`meshnode members`: who belongs to the network, and putting somebody out. Works with and without a running node."""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from meshnode.cli.main import add_data
from meshnode.cli.settings import ask_passphrase, client_of, folder_of
from meshnode.core.errors import ConfigError, IdentityError
from meshnode.core.paths import Paths
from meshnode.core.sizes import counted

if TYPE_CHECKING:
    from meshnode.membership.roll import Entry
    from protocols.ids import PeerId


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="the list as JSON (fields may be added)")
    parser.set_defaults(action="list")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listed = actions.add_parser("list", help="names, roles, since when, last seen, by whom (the default)")
    remove = actions.add_parser("remove", help="put a member out, for good and everywhere")
    remove.add_argument("peer", metavar="PEER", help="its name or peer id, as the list shows it")
    remove.add_argument("--reason", default="", help="for people, the member's owner among them")
    remove.add_argument(
        "--keeps", metavar="ROLE,ROLE", default="", help="leave it these roles instead of putting it out"
    )
    renew = actions.add_parser("renew-secret", help="give the network a new secret, which all members get")
    actions.add_parser("new-key", help="give this node a new key, which its old one signs")
    founder = actions.add_parser("new-founder-key", help="put a new founder's key in the place of the old one")
    for action in (remove, renew, founder):
        action.add_argument(
            "--founder-key", type=Path, metavar="FILE", help="network/founder.key, if you keep it somewhere else"
        )
    listed.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON")
    for action in actions.choices.values():  # before the action and behind it
        action.add_argument("--data", type=Path, metavar="FOLDER", default=argparse.SUPPRESS, help="of the node")


def run(arguments: argparse.Namespace) -> int:
    other = {"remove": _remove, "renew-secret": _renew, "new-key": _new_key, "new-founder-key": _new_founder_key}
    return other.get(arguments.action, _list)(arguments)


def entries_of(folder: Path) -> tuple[Entry, ...]:
    """The roll of a data folder's node. Raises IdentityError when it belongs to no network."""
    from meshnode.core.clock import wall_ms
    from meshnode.membership.enrolment import own_peer
    from meshnode.membership.network import load_network
    from meshnode.membership.roll import roll
    from meshnode.state.database import Database

    membership = load_network(folder)
    with Database(Paths(folder).state) as state:
        return roll(membership, state, own_peer(folder), wall_ms())


def _list(arguments: argparse.Namespace) -> int:
    entries = entries_of(folder_of(arguments))
    node = client_of(arguments)
    connected = {peer.peer for peer in node.status().peers if peer.connected} if node.is_running() else set()
    if arguments.json:
        print(json.dumps([_plain(entry, entry.peer in connected) for entry in entries], indent=2))
        return 0
    called = {entry.peer: entry.called for entry in entries}
    for number, entry in enumerate(entries):
        print(_line(entry, called, now="you" if number == 0 else "now" if entry.peer in connected else ""))
    if entries[0].standing is None:
        from meshnode.membership.place import REJOIN

        print(REJOIN)
    return 0


def _line(entry: Entry, called: dict[PeerId, str], now: str) -> str:
    from protocols.ids import short
    from protocols.membership.trust import day, ordered_roles

    if entry.standing is None:
        who = f"{entry.called} (you)" if now == "you" else entry.called
        return f"{who:<32}out: {entry.why_not}"
    by = "a founder's key" if entry.invited_by is None else called.get(entry.invited_by, short(entry.invited_by))
    seen = now or (day(entry.seen_ms) if entry.seen_ms else "never")
    rights = ", ".join(ordered_roles(entry.standing.roles)) or "nothing"
    certificate = entry.standing.certificate
    until = f", until {day(entry.standing.expires_ms)}" if entry.standing.expires_ms else ""
    return f"{entry.called:<32}{rights:<42}since {day(certificate.issued_ms)} by {by}{until}; seen: {seen}"


def _plain(entry: Entry, connected: bool) -> dict[str, object]:
    from protocols.membership.trust import ordered_roles

    standing = entry.standing
    return {
        "peer": entry.peer,
        "name": entry.name,
        "member": standing is not None,
        "roles": [] if standing is None else list(ordered_roles(standing.roles)),
        "founder": standing is not None and standing.is_founder,
        "since_ms": None if standing is None else standing.certificate.issued_ms,
        "expires_ms": None if standing is None else standing.expires_ms or None,
        "invited_by": entry.invited_by,
        "seen_ms": entry.seen_ms or None,
        "connected": connected,
        "why_not": entry.why_not,
    }


def _remove(arguments: argparse.Namespace) -> int:
    """Sign the withdrawal and renew the secret; a running node acts on it at once, another one when it starts."""
    from meshnode.core.clock import wall_ms
    from meshnode.membership.enrolment import renew_secret, withdraw_member
    from meshnode.membership.roll import find_member
    from meshnode.state.database import Database

    folder = folder_of(arguments)
    entries = entries_of(folder)
    entry = find_member(entries, arguments.peer)
    if entry is entries[0]:
        raise ConfigError("That is this very node. Remove it on the device of somebody who may invite.")
    keeps = arguments.keeps.replace(",", " ").split()
    if entry.was_put_out:
        print(f"{entry.called} is out already: {entry.why_not}. Nothing is changed.")
        print("For a new secret of the network, which it does not get: meshnode members renew-secret")
        return 0
    passphrase = cache(ask_passphrase)
    renewed = ""
    with Database(Paths(folder).state) as state:
        withdraw_member(
            folder,
            state,
            entry.peer,
            keeps=keeps,
            reason=arguments.reason,
            passphrase=passphrase,
            founder_key=arguments.founder_key,
        )
        if not keeps:
            try:
                renew_secret(folder, state, passphrase=passphrase, founder_key=arguments.founder_key)
                renewed = "The network has a new secret, which it does not get."
            except IdentityError as error:
                renewed = f"It still knows the secret of the network: {error}"
        now = wall_ms()
        usable = [invite for invite in state.invites() if invite.usable(now)]
    print(f"{entry.called} keeps {', '.join(keeps)} only." if keeps else f"{entry.called} is put out. {renewed}")
    _tell(arguments)
    if usable and not keeps:
        print(
            f"{counted(len(usable), 'ticket')} can still be used, by whoever has a copy: see "
            "`meshnode invite --list`, and make those worthless that its owner may have "
            "(meshnode invite --revoke ID)."
        )
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    """Those who are away get the new secret when they come back; strangers who know the old one never."""
    from meshnode.membership.enrolment import renew_secret
    from meshnode.state.database import Database

    folder = folder_of(arguments)
    with Database(Paths(folder).state) as state:
        renew_secret(folder, state, passphrase=ask_passphrase, founder_key=arguments.founder_key)
    print("The network has a new secret.")
    _tell(arguments)
    return 0


def _new_key(arguments: argparse.Namespace) -> int:
    """The node is another peer afterwards, with the rights that it had."""
    from meshnode.membership.identity import Identity
    from meshnode.membership.rotation import new_node_key
    from meshnode.state import releases, samples
    from meshnode.state.database import Database
    from meshnode.store.encryption import is_sealed

    folder = folder_of(arguments)
    _check_stopped(arguments)
    if is_sealed(Paths(folder).content) or samples.is_sealed(Paths(folder).samples):
        raise ConfigError(
            "The model files and samples of this node are encrypted with its key. Set content.encrypt to false, "
            "start and stop the node once, then run this again."
        )
    passphrase = cache(ask_passphrase)
    before: PeerId = Identity.load(folder, passphrase).peer_id
    with Database(Paths(folder).state) as state:
        after = new_node_key(folder, state, passphrase=passphrase)
        said = releases.take_over(state, before)
    print(f"This node is {after} from now on; {before} is nobody any more, as soon as others hear of it.")
    print(
        "Tickets that it has made let nobody in: make new ones. Who names it in network.bootstrap must name it anew."
    )
    if said:
        print("What it has said about the model, it says again when it starts.")
    print(f"\n    meshnode start --data {folder}")
    return 0


def _new_founder_key(arguments: argparse.Namespace) -> int:
    """Members stay members; what the old key signs from now on counts nowhere."""
    from meshnode.membership.rotation import new_founder_key
    from meshnode.state.database import Database

    folder = folder_of(arguments)
    _check_stopped(arguments)
    with Database(Paths(folder).state) as state:
        path = new_founder_key(folder, state, file=arguments.founder_key, passphrase=ask_passphrase)
    print(f"{path} holds the new founder's key. This node is a founder's device by its word.")
    print(f"The network hears of it when this node starts: meshnode start --data {folder}")
    return 0


def _check_stopped(arguments: argparse.Namespace) -> None:
    if client_of(arguments).is_running():
        raise ConfigError("The node runs with the key that it has. Stop it first: meshnode stop")


def _tell(arguments: argparse.Namespace) -> None:
    """Have the network hear what was written into the state file."""
    node = client_of(arguments)
    if node.is_running():
        node.members_changed()
        print("Everybody who is connected is told now; others hear of it when they come back.")
    else:
        print(f"The network hears of it when this node starts: meshnode start --data {node.folder}")
