"""One writer and many readers of a gallery. The system drops a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import filelock

from ..errors import GalleryLockedError

WRITER = "writer.lock"
HOLDER = "writer.pid"
READERS = "readers.lock"


class WriterLock:
    """Held by the one process, and the one thread, that writes."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self._folder = folder
        self._lock = filelock.FileLock(folder / WRITER, timeout=timeout, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, waiting for it as long as the timeout.

        Raises:
            GalleryLockedError: somebody else is writing.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise GalleryLockedError(
                f"{self._folder}: another process{self._holder()} is writing to it; "
                "wait until it has finished (--wait SECONDS), or stop it"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: what matters will say so
            (self._folder / HOLDER).write_text(str(os.getpid()))

    def _holder(self) -> str:
        for _ in range(20):  # whoever has just taken the lock is about to write it
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
    """Shared by every open gallery, so that files of an older generation are deleted only when nobody reads them.

    The system drops it when a process ends, however it ends.
    """

    def __init__(self, folder: Path, exclusive: bool = False) -> None:
        """Take the lock.

        Raises:
            BlockingIOError: exclusive, and somebody reads.
        """
        self._descriptor: int | None = None
        try:
            import fcntl

            self._descriptor = os.open(folder / READERS, os.O_RDONLY)
            fcntl.flock(self._descriptor, (fcntl.LOCK_EX | fcntl.LOCK_NB) if exclusive else fcntl.LOCK_SH)
        except (ImportError, OSError):  # somebody reads; or there is no such lock here, as on Windows
            self.close()
            if exclusive:
                raise BlockingIOError from None

    def __enter__(self) -> ReaderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = close  # a gallery that nobody closed is no reader any more
