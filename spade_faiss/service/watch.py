"""Folders whose new images are inspected as they arrive."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from ..errors import ImageError
from ..images.decode import read_file
from ..images.sources import list_sources
from .errors import ServiceError
from .log.database import Database
from .settings import ServiceSettings

logger = logging.getLogger("spade_faiss.service")
WAITED_FOR = (423, 429, 503, 507)  # statuses of what passes: a full queue, a gallery or disk that is not there for now
FOR_ALL = ("gallery_unavailable", "queue_full")  # codes of what keeps every file waiting, not one
PAUSE = 1.0  # seconds between looks into a folder; a file that has not changed since the last look is whole
LONGEST = 300.0  # seconds until a file is tried again, at most: twice as long after each failure
Inspect = Callable[[str, bytes], Awaitable[object]]


class FolderWatch:
    """Finds files that are new and no longer grow, and has each inspected once, also across restarts."""

    def __init__(self, settings: ServiceSettings, database: Database) -> None:
        self._folders = settings.watch
        self._database = database
        self._seen: dict[str | bytes, str] = {}  # by path: size and time at the last look
        self._done: dict[str | bytes, str] = {}  # likewise, of what was inspected and is not remembered yet
        self._told: dict[str | bytes, str] = {}  # by path: why it cannot be read, which is told once
        self._held: dict[str | bytes, tuple[float, float]] = {}  # by path: when one that failed is due, and its pause
        self._stop = threading.Event()
        for folder in self._folders:
            if not folder.is_dir():
                why = "expected a folder to watch, found none; what arrives is inspected once there is one"
                logger.warning(json.dumps({"event": "watched folder", "path": str(folder), "why": why}))

    def close(self) -> None:
        """Look no more."""
        self._stop.set()

    def arrived(self) -> list[tuple[Path, str]]:
        """Return the files that have arrived whole since the last inspection of each, and their stamps."""
        found, seen = [], dict[str | bytes, str]()
        for folder in self._folders:
            try:
                files = list_sources([folder])
            except ImageError:  # no image yet, or the folder is gone for now
                continue
            for file in files:
                path = _key(file.path)
                try:
                    status = file.path.stat()
                except OSError:
                    continue
                seen[path] = f"{status.st_size} {status.st_mtime_ns}"
                if self._seen.get(path) == seen[path] and self._known(path) != seen[path]:
                    found.append((file.path, seen[path]))
        self._seen = seen
        self._held = {path: held for path, held in self._held.items() if path in seen}
        return found

    def _known(self, path: str | bytes) -> str | None:
        rows = self._database.rows("SELECT stamp FROM arrivals WHERE path = ?", (path,))
        return str(rows[0][0]) if rows else None

    def remember(self, path: Path, stamp: str) -> None:
        """Keep that a file was inspected."""
        with self._database.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO arrivals VALUES (?, ?)", (_key(path), stamp))

    async def run(self, inspect: Inspect) -> None:
        """Inspect what arrives, one image after the other, until closed; what passes is waited for, as a full queue.

        A file that cannot be inspected for now holds up no other one.
        """
        problem = ""
        while self._folders and not self._stop.is_set():
            try:
                for path, stamp in await asyncio.to_thread(self.arrived):
                    await self._taken(path, stamp, inspect)
                problem = ""
            except Exception as error:  # as of a log that cannot be written for now: the next look finds the same files
                if repr(error) != problem:  # told once, not at each look
                    logger.exception("watched folders")
                problem = repr(error)
            await asyncio.sleep(PAUSE)

    async def _taken(self, path: Path, stamp: str, inspect: Inspect) -> None:
        """Have a file inspected, and remember it. One that cannot be, for now, is left to a later look."""
        key = _key(path)
        while self._done.get(key) != stamp:
            if self._stop.is_set() or time.monotonic() < self._held.get(key, (0.0, 0.0))[0]:
                return
            try:
                content = await asyncio.to_thread(read_file, path)
                await inspect(path.name, content)
            except ImageError as error:
                self._tell(path, str(error))
                if isinstance(error.__cause__, OSError):
                    return
            except ServiceError as error:
                if error.code in FOR_ALL:
                    await asyncio.sleep(PAUSE)
                    continue
                self._tell(path, error.message)
                if error.status in WAITED_FOR:  # as of neighbours that are damaged: others may have other neighbours
                    return self._hold(key)
            except (OSError, MemoryError) as error:  # as of too many open files, which passes
                self._tell(path, str(error) or type(error).__name__)
                return self._hold(key)
            except sqlite3.OperationalError:  # of the log: nothing was inspected
                raise
            except Exception:  # a file that breaks one inspection does not end the watch
                logger.exception("watched file %s", path)
            self._done[key] = stamp
        await asyncio.to_thread(self.remember, path, stamp)
        del self._done[key]
        self._told.pop(key, None)
        self._held.pop(key, None)

    def _hold(self, key: str | bytes) -> None:
        """Leave a file alone for a while."""
        pause = min(2 * self._held.get(key, (0.0, PAUSE / 2))[1], LONGEST)
        self._held[key] = time.monotonic() + pause, pause

    def _tell(self, path: Path, why: str) -> None:
        if self._told.get(_key(path)) != why:
            logger.warning(json.dumps({"event": "watched file", "path": str(path), "why": why}))
        self._told[_key(path)] = why


def _key(path: Path) -> str | bytes:
    """Return a path as the log can keep it: as text, or as bytes where its name is no UTF-8."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return text
