"""The small durable state of a node in one SQLite file: invites, peers met, signed records.

Calls block, shortly: one indexed statement or transaction on a file of some kilobytes, well under a
millisecond on a disk and a few milliseconds where a commit is flushed. Services call them directly. Several
processes may open the file at the same time (`sqlite_file.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from meshnode.membership.port import Invite
from meshnode.state.invites import check_invite
from meshnode.state.port import MAX_ADDRESSES, MAX_PEERS
from meshnode.state.sqlite_file import SqliteFile
from protocols.ids import PeerId

# Numbered from 1, append only: a file written by any earlier version is brought up to date when it is opened.
MIGRATIONS: Final = (
    """
    CREATE TABLE invites (
        id BLOB PRIMARY KEY, secret_hash BLOB NOT NULL, roles TEXT NOT NULL, uses INTEGER NOT NULL,
        created_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL, member_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE redemptions (
        invite BLOB NOT NULL REFERENCES invites(id) ON DELETE CASCADE, peer TEXT NOT NULL, at_ms INTEGER NOT NULL,
        PRIMARY KEY (invite, peer)
    ) WITHOUT ROWID;
    CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE peers (
        peer TEXT NOT NULL, address TEXT NOT NULL, seen_ms INTEGER NOT NULL, PRIMARY KEY (peer, address)
    ) WITHOUT ROWID;
    CREATE TABLE records (
        kind TEXT NOT NULL, signer TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (kind, signer)
    ) WITHOUT ROWID;
    """,
    "ALTER TABLE invites ADD COLUMN revoked_ms INTEGER NOT NULL DEFAULT 0",
)
_COLUMNS: Final = "id, secret_hash, roles, uses, created_ms, expires_ms, member_ms, revoked_ms"


class Database(SqliteFile):
    """The open state file. Close it with `close` or use it in a `with` block. For one thread."""

    def __init__(self, path: Path) -> None:
        """Open or make the file, mode 0600, and bring it up to date.

        Raises DiskError (can't be opened or is no database), ConfigError (written by a newer version).
        """
        super().__init__(
            path,
            MIGRATIONS,
            what="state file",
            lost="open tickets and remembered addresses are lost with it, and who was put out is learned again from "
            "others",
        )

    # Invites

    def add_invite(self, invite: Invite) -> None:
        with self._transaction():
            self._db.execute(
                f"INSERT INTO invites ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    invite.id,
                    invite.secret_hash,
                    ",".join(invite.roles),
                    invite.uses,
                    invite.created_ms,
                    invite.expires_ms,
                    invite.member_ms,
                    invite.revoked_ms,
                ),
            )

    def invites(self) -> tuple[Invite, ...]:
        with self._guard():
            rows = self._db.execute(
                f"SELECT {_COLUMNS}, (SELECT count(*) FROM redemptions WHERE invite = id) FROM invites "
                "ORDER BY created_ms, id"
            ).fetchall()
        return tuple(_invite(row) for row in rows)

    def revoke_invite(self, invite: bytes, wall_ms: int) -> bool:
        with self._transaction():
            return (
                self._db.execute(
                    "UPDATE invites SET revoked_ms = ? WHERE id = ? AND revoked_ms = 0", (wall_ms, invite)
                ).rowcount
                > 0
            )

    def revoke_redeemed(self, peer: PeerId, made_by_ms: int) -> int:
        with self._transaction():
            return self._db.execute(
                "UPDATE invites SET revoked_ms = ?1 WHERE revoked_ms = 0 AND created_ms <= ?1 "
                "AND id IN (SELECT invite FROM redemptions WHERE peer = ?2)",
                (made_by_ms, peer),
            ).rowcount

    def redeem(self, invite: bytes, secret: bytes, peer: PeerId, wall_ms: int, *, not_before_ms: int = 0) -> Invite:
        """See `membership/port.py`. One transaction, flushed to the disk: a power cut does not give a use back."""
        with self._guard():
            self._db.execute("PRAGMA synchronous=FULL")
        try:
            with self._transaction():
                return self._redeem(invite, secret, peer, wall_ms, not_before_ms)
        finally:
            with self._guard():
                self._db.execute("PRAGMA synchronous=NORMAL")

    def _redeem(self, id_: bytes, secret: bytes, peer: PeerId, wall_ms: int, not_before_ms: int) -> Invite:
        row = self._db.execute(
            f"SELECT {_COLUMNS}, (SELECT count(*) FROM redemptions WHERE invite = id) FROM invites WHERE id = ?",
            (id_,),
        ).fetchone()
        mine = self._db.execute("SELECT 1 FROM redemptions WHERE invite = ? AND peer = ?", (id_, peer)).fetchone()
        known = None if row is None else _invite(row)
        invite = check_invite(known, secret, peer, wall_ms, not_before_ms=not_before_ms, again=mine is not None)
        if mine is None:
            self._db.execute("INSERT INTO redemptions VALUES (?, ?, ?)", (id_, peer, wall_ms))
        return invite

    def next_serial(self) -> int:
        with self._transaction():
            (value,) = self._db.execute(
                "INSERT INTO counters VALUES ('serial', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1 "
                "RETURNING value"
            ).fetchone()
        return int(value)

    # Peers

    def remember_peer(self, peer: PeerId, addresses: Sequence[str], wall_ms: int) -> None:
        with self._transaction():
            self._db.executemany(
                "INSERT INTO peers VALUES (?, ?, ?) "
                "ON CONFLICT (peer, address) DO UPDATE SET seen_ms = max(seen_ms, excluded.seen_ms)",
                [(peer, address, wall_ms) for address in addresses[:MAX_ADDRESSES]],
            )
            self._db.execute(
                "DELETE FROM peers WHERE peer = ?1 AND address NOT IN "
                "(SELECT address FROM peers WHERE peer = ?1 ORDER BY seen_ms DESC, address LIMIT ?2)",
                (peer, MAX_ADDRESSES),
            )
            self._db.execute(
                "DELETE FROM peers WHERE peer NOT IN "
                "(SELECT peer FROM peers GROUP BY peer ORDER BY max(seen_ms) DESC, peer LIMIT ?)",
                (MAX_PEERS,),
            )

    def forget_peer(self, peer: PeerId) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM peers WHERE peer = ?", (peer,))

    def known_peers(self) -> dict[PeerId, tuple[str, ...]]:
        with self._guard():
            rows = self._db.execute("SELECT peer, address FROM peers ORDER BY seen_ms DESC, peer, address").fetchall()
        out: dict[PeerId, tuple[str, ...]] = {}
        for peer, address in rows:
            out[PeerId(peer)] = (*out.get(PeerId(peer), ()), address)
        return out

    # Signed records

    def put_record(self, kind: str, signer: str, data: bytes) -> None:
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (kind, signer, data))

    def record(self, kind: str, signer: str) -> bytes | None:
        with self._guard():
            row = self._db.execute(
                "SELECT data FROM records WHERE kind = ? AND signer = ?", (kind, signer)
            ).fetchone()
        return None if row is None else bytes(row[0])

    def records(self, kind: str) -> dict[str, bytes]:
        with self._guard():
            rows = self._db.execute(
                "SELECT signer, data FROM records WHERE kind = ? ORDER BY signer", (kind,)
            ).fetchall()
        return {signer: bytes(data) for signer, data in rows}

    def remove_record(self, kind: str, signer: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM records WHERE kind = ? AND signer = ?", (kind, signer))


def _invite(row: tuple[bytes, bytes, str, int, int, int, int, int, int]) -> Invite:
    id_, secret_hash, roles, uses, created_ms, expires_ms, member_ms, revoked_ms, used = row
    return Invite(
        id=id_,
        secret_hash=secret_hash,
        roles=tuple(roles.split(",")) if roles else (),
        uses=uses,
        created_ms=created_ms,
        expires_ms=expires_ms,
        member_ms=member_ms,
        used=used,
        revoked_ms=revoked_ms,
    )
