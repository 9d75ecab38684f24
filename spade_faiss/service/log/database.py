"""The log's file: SQLite in WAL mode, one connection that writes, and one for each thread that reads."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from ...errors import OutputError

FILE = "log.sqlite"
LOCK = "log.lock"  # held as long as the log is open; the system drops it when the process ends in any way
VERSION = 1
SCHEMA = """
CREATE TABLE inspections (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  uid TEXT NOT NULL UNIQUE, at REAL NOT NULL, request TEXT NOT NULL, who TEXT NOT NULL, gallery TEXT NOT NULL,
  name TEXT NOT NULL, sha256 TEXT NOT NULL, error TEXT, message TEXT, verdict TEXT, image_score REAL, score REAL,
  p_value REAL, map_max REAL, peak REAL, generation INTEGER, calibration INTEGER, stale INTEGER, searched INTEGER,
  ms REAL, facts TEXT NOT NULL, label TEXT, labelled_by TEXT, labelled_at REAL
);
CREATE INDEX inspections_of_gallery ON inspections (gallery, id);
CREATE INDEX inspections_by_content ON inspections (sha256);
CREATE TABLE artifacts (
  inspection INTEGER NOT NULL REFERENCES inspections (id) ON DELETE CASCADE, kind TEXT NOT NULL, content BLOB NOT NULL,
  PRIMARY KEY (inspection, kind)
) WITHOUT ROWID;
CREATE TABLE changes (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  at REAL NOT NULL, request TEXT NOT NULL, who TEXT NOT NULL, gallery TEXT NOT NULL, what TEXT NOT NULL,
  key TEXT, inspection TEXT, generation_before INTEGER, generation_after INTEGER,
  state TEXT NOT NULL, message TEXT, undoes INTEGER REFERENCES changes (id), facts TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX changes_of_gallery ON changes (gallery, id);
CREATE TABLE outbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  target TEXT NOT NULL, body TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL, error TEXT
);
CREATE INDEX outbox_due ON outbox (target, id);
CREATE TABLE arrivals (path TEXT PRIMARY KEY, stamp TEXT NOT NULL);
CREATE TABLE marks (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Database:
    """The log's tables, of one service at a time. What `writing` has left is on disk, whenever it is killed."""

    def __init__(self, folder: Path) -> None:
        """Open the log in a folder, or make it.

        Raises:
            OutputError: it cannot be opened, another service has it open, or a later release made it.
        """
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._held = filelock.FileLock(folder / LOCK, timeout=0, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._held.acquire()
            self._writer = self._connect()
            self._writer.execute("PRAGMA journal_mode = WAL")
            with self.writing() as connection:
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in SCHEMA.split(";\n"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {VERSION}")
        except filelock.Timeout as error:
            raise OutputError(
                f"{folder}: expected a folder that no other service uses, found that one does; choose another folder "
                "(data=FOLDER), or stop that service"
            ) from error
        except (OSError, sqlite3.Error) as error:
            self._held.release()
            raise OutputError(f"cannot open {self.path}: {error}; choose another folder (data=FOLDER)") from error
        if version not in (0, VERSION):
            self.close()
            raise OutputError(f"{self.path}: expected a log of version {VERSION}, found {version}; update spade-faiss")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # acknowledged means on disk, not in the system's memory
        return connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Write in one transaction: all of the block, or nothing of it."""
        with self._lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """Read rows, beside whoever writes."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            with self._lock:
                self._readers.append(connection)
        return list(connection.execute(statement, values))

    def mark(self, name: str, default: str = "") -> str:
        """Return a value that was kept by name."""
        rows = self.rows("SELECT value FROM marks WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else default

    def set_mark(self, name: str, value: str) -> None:
        """Keep a value by name."""
        with self.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))

    def close(self) -> None:
        """Close all connections, and let another service have the log."""
        with self._lock:
            for connection in (*self._readers, self._writer):
                connection.close()
            self._readers.clear()
            self._held.release()
