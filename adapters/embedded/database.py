"""The SQLite file of the embedded queue: its access rights, its tables, and the clock of its times."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL, published_at REAL NOT NULL,
    visible_at REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, lease TEXT,
    reason TEXT, stage TEXT, error TEXT);
CREATE INDEX IF NOT EXISTS messages_ready ON messages (visible_at, id);
CREATE TABLE IF NOT EXISTS dead_letters (
    id INTEGER PRIMARY KEY, body BLOB NOT NULL, published_at REAL NOT NULL, attempts INTEGER NOT NULL,
    reason TEXT NOT NULL, stage TEXT NOT NULL, error TEXT NOT NULL, dead_lettered_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS dead_letters_oldest ON dead_letters (dead_lettered_at, id);
CREATE TABLE IF NOT EXISTS clock (boot_id TEXT NOT NULL);
"""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # exists on Linux


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file, and create it if it is missing. Raises OSError and sqlite3.Error."""
    _create(path)
    return _connect(path)


def _create(path: Path) -> None:
    """Create missing directories and the file so that only its owner has access: messages contain personal data.

    SQLite gives its other files the same mode. Raises OSError, also if `path` is a link to nothing: SQLite would create
    the file that the link names.
    """
    for directory in reversed(path.absolute().parents):
        if not directory.exists():
            with suppress(FileExistsError):  # another process has just created it
                directory.mkdir(mode=0o700)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if not path.exists():
            raise


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file and create missing tables. If that fails, close the connection."""
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA secure_delete = ON")  # a message that was acked leaves nothing in the file
        connection.execute("PRAGMA temp_store = MEMORY")  # a read-only root has no place for temporary files
        connection.executescript(_SCHEMA)
        _release_after_boot(connection, _boot_id())
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _release_after_boot(connection: sqlite3.Connection, boot_id: str) -> None:
    """Make all messages ready if the machine has booted since the file was last opened, or if the file was moved.

    Their times belong to a clock that no longer exists, and so do the processes that had leased them.
    """
    query = "SELECT 1 FROM clock WHERE boot_id = ?"
    if connection.execute(query, (boot_id,)).fetchone():
        return
    connection.execute("BEGIN IMMEDIATE")
    if not connection.execute(query, (boot_id,)).fetchone():  # another process can have done it in the meantime
        connection.execute("UPDATE messages SET visible_at = 0, lease = NULL")
        connection.execute("DELETE FROM clock")
        connection.execute("INSERT INTO clock VALUES (?)", (boot_id,))
    connection.execute("COMMIT")


def _boot_id() -> str:
    """Return an id that changes when the machine boots. Without Linux's id, it is the time of the boot."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return f"{time.time() - time.monotonic():.0f}"
