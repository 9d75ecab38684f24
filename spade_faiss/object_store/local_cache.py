"""Objects, and parts of them, in a folder on this machine's disk: bounded in bytes, shared by processes.

A file is written under a temporary name and renamed, so that it is whole or absent. Its name holds the checksum of the
object that it is from, and whoever loads a file compares it with a checksum first. The bytes in use are counted in one
file under a lock; they are reserved before a file is written. The files that were used least recently go first.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import filelock

from ..errors import OptionError
from ..options import MIB
from ..system.atomic_files import TEMPORARY, storage_errors
from .commit import SUFFIX

CACHE_BYTES = 10_240 * MIB  # of a cache, unless the caller says otherwise
VARIABLE = "SPADE_FAISS_CACHE"  # names the folder of a cache, unless the caller does
USED, LOCK = "used", "cache.lock"
KEPT = 0.9  # share of the limit that is left when files are evicted, so that this is rare
PATIENCE = 5  # seconds to wait for what others are writing where nothing else can go
ABANDONED = 3600  # seconds after which a temporary file is that of a process that was killed
# Names of the cache's own files, each in the folder of its first two letters: objects, levels of an image, unfinished.
OWN_NAME = re.compile(rf"[0-9a-f]{{32}}({SUFFIX}|-[0-9]+\.levels)(\.[0-9]+-[0-9]+-[0-9]+{re.escape(TEMPORARY)})?")

_numbers = itertools.count()


def default_folder() -> Path:
    """Return the folder of a cache that nobody named: $SPADE_FAISS_CACHE, or spade-faiss among the user's caches."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spade-faiss"


class LocalCache:
    """A folder of files, at most `limit` bytes. Threads and processes may share one."""

    def __init__(self, folder: Path, limit: int = CACHE_BYTES) -> None:
        """Make the folder, unless it is there.

        Raises:
            GalleryError: it cannot be made or written.
        """
        self.folder = folder
        self.limit = limit
        with self._errors():
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                pass

    def path(self, name: str) -> Path:
        """Return where a file is, if it is there."""
        return self.folder / name[:2] / name

    def load(self, name: str) -> bytes | None:
        """Read a small file, which becomes the most recent one; None: it is not there. The caller compares it."""
        path = self.path(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:  # a damaged disk: the store has the bytes too
            return None
        self.touch(name)
        return content

    def touch(self, name: str) -> None:
        """Make a file the most recent one."""
        with contextlib.suppress(OSError):  # another process has just evicted it
            os.utime(self.path(name))

    def drop(self, name: str) -> None:
        """Delete a file that is not what its name says."""
        with contextlib.suppress(OSError):
            self.path(name).unlink()

    def fits(self, size: int) -> bool:
        """Return whether a file can be kept at all."""
        return size <= self.limit

    def require(self, size: int, what: object) -> None:
        """Check that a file can be kept.

        Raises:
            OptionError: it is larger than the cache.
        """
        if not self.fits(size):
            raise OptionError(
                f"{self.folder}: expected a cache of at least {size} bytes, for {what}, found a limit of {self.limit}; "
                "raise it (cache_bytes=SIZE)"
            )

    def put(self, name: str, size: int, content: Iterable[bytes]) -> Path:
        """Keep a file of `size` bytes, and return its path. What fails while it is written leaves nothing.

        Raises:
            GalleryError: the folder cannot be written, or its disk is full.
            Whatever reading `content` raises.
        """
        path = self.path(name)
        number = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
        temporary = path.with_name(f"{name}.{number}{TEMPORARY}")
        try:
            with self._errors():
                path.parent.mkdir(exist_ok=True)
                file = self._reserve(temporary, size)
            with file:
                for block in content:
                    with self._errors():
                        file.write(block)
                with self._errors():
                    file.flush()
            with self._errors(), self._lock():  # whoever counts sees it under one of the two names
                temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return path

    def _reserve(self, temporary: Path, size: int) -> BinaryIO:
        """Open a file of `size` bytes to write, counted from now on.

        It evicts others where they would be too many, and waits for what others are writing, though not for ever: the
        process may have been killed.
        """
        patient_until = time.monotonic() + PATIENCE
        while True:
            with self._lock():
                used = self._used()
                if used + size > self.limit:
                    used = self._evict(min(int(self.limit * KEPT), self.limit - size))
                if used + size <= self.limit or time.monotonic() > patient_until:
                    (self.folder / USED).write_text(str(used + size))
                    file = temporary.open("wb")
                    file.truncate(size)  # whoever counts before it is written counts all of it
                    return file
            time.sleep(0.01)

    def _used(self) -> int:
        """Return the bytes that are counted, or the limit, so that they are counted again."""
        try:
            return int((self.folder / USED).read_text())
        except (FileNotFoundError, ValueError):  # a new cache, or a process was killed while it wrote the number
            return self.limit

    def _evict(self, room: int) -> int:
        """Delete the least recent files until the others take at most `room` bytes; returns how many they take.

        Files of another name are not the cache's: the folder may be a user's own.
        """
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("??/*"):
            if OWN_NAME.fullmatch(path.name) and path.parent.name == path.name[:2]:
                with contextlib.suppress(OSError):  # another process has just renamed it
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        used, now = sum(size for _, size, _ in found), time.time()
        for changed, size, path in sorted(found):
            abandoned = path.suffix == TEMPORARY and now - changed > ABANDONED
            if abandoned or (used > room and path.suffix != TEMPORARY):
                with contextlib.suppress(OSError):  # somebody has it open, on Windows
                    path.unlink(missing_ok=True)
                    used -= size
        return used

    def _lock(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / LOCK)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return storage_errors(f"cannot write to the cache {self.folder} (cache=FOLDER)")
