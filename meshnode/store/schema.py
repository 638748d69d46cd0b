"""The index of the content folder: SQLite tables, as numbered migrations that are only ever appended to.

files   one row per file under `files/`; complete = 0 while it is a `.part`
leaves  (CID of a raw block, file, position): the block is the range [position * chunk, + chunk) of that file;
        in a partial file only positions that were verified and written have a row
nodes   inner nodes of the trees, whole
blocks  blocks of their own (manifests), whole
pins    names that protect a file or block from eviction
"""

from __future__ import annotations

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE files (
        id INTEGER PRIMARY KEY,
        cid BLOB NOT NULL UNIQUE,
        size INTEGER NOT NULL,
        chunk INTEGER NOT NULL,
        complete INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        used_ms INTEGER NOT NULL
    );
    CREATE TABLE leaves (
        cid BLOB NOT NULL,
        file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
        position INTEGER NOT NULL,
        PRIMARY KEY (cid, file, position)
    ) WITHOUT ROWID;
    CREATE INDEX leaves_by_file ON leaves (file);
    CREATE TABLE nodes (
        file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
        cid BLOB NOT NULL,
        data BLOB NOT NULL,
        UNIQUE (cid, file)
    );
    CREATE INDEX nodes_by_file ON nodes (file);
    CREATE TABLE blocks (
        cid BLOB PRIMARY KEY,
        data BLOB NOT NULL,
        used_ms INTEGER NOT NULL
    );
    CREATE TABLE pins (
        name TEXT NOT NULL,
        cid BLOB NOT NULL,
        PRIMARY KEY (name, cid)
    ) WITHOUT ROWID;
    CREATE INDEX pins_by_cid ON pins (cid);
    """,
)
