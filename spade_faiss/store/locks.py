"""Locks for one writer and many readers of a gallery. The system drops them when their process ends in any way."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import filelock

from ..errors import GalleryLockedError, OptionError

WRITER = "writer.lock"
HOLDER = "writer.pid"
READERS = "readers.lock"


class WriterLock:
    """Held by the one thread of the one process that writes."""

    def __init__(self, folder: Path, timeout: float) -> None:
        """Take the folder of a gallery, and the seconds to wait for another writer.

        Raises:
            OptionError: no number of seconds.
        """
        if not timeout >= 0:
            raise OptionError(f"timeout: expected seconds, 0 or more, found {timeout}")
        self._folder = folder
        self._lock = filelock.FileLock(folder / WRITER, timeout=timeout, thread_local=False)

    def acquire(self) -> None:
        """Take the lock; waits for it up to the timeout.

        Raises:
            GalleryLockedError: another writer holds it.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise GalleryLockedError(
                f"{self._folder}: another process{self._holder()} is writing to it; "
                "wait until it has finished (timeout=SECONDS), or stop it"
            ) from error
        with contextlib.suppress(OSError):  # on a full disk, the first write that matters fails
            (self._folder / HOLDER).write_text(str(os.getpid()))
            (self._folder / READERS).touch()  # a copy may lack it, as empty files are left out

    def _holder(self) -> str:
        for _ in range(20):  # a process that has just taken the lock is about to write its id
            try:
                return f" (process {int((self._folder / HOLDER).read_text())})"
            except (OSError, ValueError):
                time.sleep(0.01)
        return ""

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> WriterLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class ReaderLock:
    """Shared by every open gallery: files of an older generation are deleted only when nobody holds it.

    A gallery that was copied without its empty files lacks the lock's file until somebody writes. Until then readers,
    who need not be able to write, lock the folder itself.
    """

    def __init__(self, folder: Path, exclusive: bool = False) -> None:
        """Take the lock.

        Raises:
            BlockingIOError: `exclusive`, and a reader holds it.
        """
        self._descriptors: list[int] = []
        try:
            if exclusive:
                self._take(folder / READERS, exclusive)
                self._take_folder(folder)
            else:
                try:
                    self._take(folder / READERS, exclusive)
                except FileNotFoundError:
                    self._take(folder, exclusive)
        except (ImportError, OSError):  # a reader holds it, or this system has no such lock (Windows)
            self.close()
            if exclusive:
                raise BlockingIOError from None

    def _take(self, path: Path, exclusive: bool) -> None:
        import fcntl

        self._descriptors.append(os.open(path, os.O_RDONLY))
        fcntl.flock(self._descriptors[-1], (fcntl.LOCK_EX | fcntl.LOCK_NB) if exclusive else fcntl.LOCK_SH)

    def _take_folder(self, folder: Path) -> None:
        """Take the lock of those who opened the gallery when it lacked the lock's file."""
        try:
            self._take(folder, exclusive=True)
        except BlockingIOError:
            raise
        except OSError:  # no folder can be locked here: nobody holds it
            pass

    def __enter__(self) -> ReaderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)

    __del__ = close  # an unclosed gallery that is garbage does not block writers
