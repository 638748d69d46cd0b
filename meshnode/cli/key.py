"""`meshnode key`: keys by which programs may ask this node over HTTP."""

from __future__ import annotations

import argparse
import json
from typing import Final

from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of
from meshnode.core.clock import wall_ms
from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths
from meshnode.core.printable import printable
from meshnode.state.api_keys import MAX_NAME, SCOPES, ApiKey, keys, make_key, revoke_key
from meshnode.state.database import Database
from protocols.membership.trust import day

DAY_MS: Final = 86_400_000
MAX_DAYS: Final = 36_600.0
MAX_LIMIT: Final = 1_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key; it is shown once")
    add.add_argument("name", metavar="NAME", help="whose it is, for `key list`")
    add.add_argument(
        "--scopes",
        default="infer,embed,feedback",
        metavar="SCOPE,SCOPE",
        help=f"what it opens: {', '.join(SCOPES)} (metrics, events, orders, and all the others); default %(default)s",
    )
    add.add_argument("--days", type=float, default=0.0, help="how long it is good (default: for ever)")
    add.add_argument("--requests-per-minute", type=int, default=0, metavar="N", help="default: no limit")
    add.add_argument(
        "--tokens-per-day", type=int, default=0, metavar="N", help="of prompts and answers; default: none"
    )
    listed = actions.add_parser("list", help="every key of this node, without its secret")
    revoke = actions.add_parser("revoke", help="make a key worthless, at once")
    revoke.add_argument("id", metavar="ID", help="`key list` shows it")
    for action in (add, listed, revoke):
        add_data(action)
        action.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    path = Paths(folder_of(arguments)).state
    if not path.exists():
        raise ConfigError(f"{path.parent} is no data folder of a node; `meshnode init` or `join` makes one")
    with Database(path) as state:
        match arguments.action:
            case "add":
                return _add(arguments, state)
            case "list":
                return _list(arguments, state)
            case _:
                key = revoke_key(state, arguments.id, wall_ms())
                words = f"The key {printable(key.name)} ({key.id}) opens nothing any more."
                print(json.dumps(_plain(key)) if arguments.json else words)
                return 0


def _add(arguments: argparse.Namespace, state: Database) -> int:
    scopes = tuple(dict.fromkeys(arguments.scopes.replace(",", " ").split()))
    if not scopes or not set(scopes) <= set(SCOPES):
        raise ConfigError(f"--scopes {arguments.scopes!r}: it takes one or more of {', '.join(SCOPES)}")
    if not arguments.name.isprintable() or not 1 <= len(arguments.name) <= MAX_NAME:
        raise ConfigError(f"a name has 1 to {MAX_NAME} printable characters")
    if not 0 <= arguments.days <= MAX_DAYS:
        raise ConfigError(f"--days {arguments.days:g}: it takes 0 (for ever) to {MAX_DAYS:g}")
    for flag in ("requests_per_minute", "tokens_per_day"):
        if not 0 <= getattr(arguments, flag) <= MAX_LIMIT:
            raise ConfigError(f"--{flag.replace('_', '-')} takes 0 (no limit) to {MAX_LIMIT}")
    now = wall_ms()
    key, text = make_key(
        state,
        arguments.name,
        scopes=scopes,
        now_ms=now,
        expires_ms=now + int(arguments.days * DAY_MS) if arguments.days else 0,
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_day=arguments.tokens_per_day,
    )
    if arguments.json:
        print(json.dumps({**_plain(key), "key": text}))
        return 0
    print(text)
    print("It is shown this once. Programs send it as their API key; `meshnode key revoke` takes it back.")
    return 0


def _list(arguments: argparse.Namespace, state: Database) -> int:
    found = keys(state)
    if arguments.json:
        print(json.dumps([_plain(key) for key in found]))
        return 0
    if not found:
        print("This node has no keys. Make one with: meshnode key add NAME")
    for key in found:
        if key.revoked_ms:
            until = f"revoked {day(key.revoked_ms)}"
        elif key.expires_ms:
            until = f"{'expired' if key.expires_ms <= wall_ms() else 'until'} {day(key.expires_ms)}"
        else:
            until = "does not expire"
        limits = [f"{key.requests_per_minute} requests a minute"] if key.requests_per_minute else []
        limits += [f"{key.tokens_per_day} tokens a day"] if key.tokens_per_day else []
        print("  ".join((key.id, f"{printable(key.name):<20}", f"{until:<24}", ", ".join((*key.scopes, *limits)))))
    return 0


def _plain(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "created_ms": key.created_ms,
        "expires_ms": key.expires_ms,
        "revoked_ms": key.revoked_ms,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_day": key.tokens_per_day,
    }
