"""Keeps shards' files open for any number of threads, which read at given offsets without HDF5."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..system.forks import free_at_forks, remember
from .damage import damaged

MOST_OPEN = 1024  # files, even if the process may open far more


class PooledFile:
    """An open file, which closes when the last thread lets go of it. The file may be deleted meanwhile."""

    def __init__(self, path: Path, size: int) -> None:
        """Open a file of `size` bytes; raises as FilePool.open."""
        self._path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            status = os.fstat(self.descriptor)
        except OSError as error:
            raise damaged(path, f"cannot be opened: {error.strerror or error}", error) from error
        if status.st_size != size:
            raise damaged(path, f"expected {size} bytes, found {status.st_size}")
        self.stamp = f"{status.st_ino} {status.st_mtime_ns}"  # of this file, whatever takes its path later

    def for_hdf5(self) -> Any:
        """Return what HDF5 opens to read the file: its path, or a file of Python."""
        return self._path

    def read_into(self, rest: memoryview, offset: int) -> None:
        """Fill a memoryview with the bytes from an offset on.

        Raises:
            OSError: the bytes cannot be read, or the file has been cut short.
        """
        while rest:
            done = read_at(self.descriptor, rest, offset)
            if done == 0:
                raise OSError("the file has been cut short")
            rest, offset = rest[done:], offset + done

    def __del__(self) -> None:
        descriptor = self.__dict__.pop("descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


class FilePool:
    """Keeps open the files of the shards that were read most recently. Threads may share one."""

    def __init__(
        self,
        opener: Callable[[Path, int], PooledFile] = PooledFile,
        prefetch: Callable[[Iterable[Path]], None] | None = None,
    ) -> None:
        """Open files.

        Args:
            opener: opens one, by path and size.
            prefetch: gets several that will be opened; None: there is nothing to get.
        """
        self._opener = opener
        self.prefetch = prefetch
        self._files: OrderedDict[int, PooledFile] = OrderedDict()
        self._room = _files_to_hold()
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock. The files stay open: reading at an offset moves nothing that the parent uses."""
        self._lock = threading.Lock()

    def open(self, number: int, path: Path, size: int) -> PooledFile:
        """Return the open file of a shard; open it first if it is closed.

        Args:
            number: of the shard.
            path: its file.
            size: of its file, in bytes.

        Raises:
            CorruptGalleryError: it cannot be opened, or has another size.
        """
        with self._lock:
            file = self._files.get(number)
            if file is None:
                file = self._files[number] = self._opener(path, size)
                if len(self._files) > self._room:
                    self._files.popitem(last=False)
            self._files.move_to_end(number)
            return file

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        """Let go of the files; each closes when its last reader has finished."""
        with self._lock:
            self._files.clear()


def _files_to_hold() -> int:
    """Return how many files to keep open: a sixteenth of the process's limit, as three snapshots may be in use."""
    try:
        import resource
    except ImportError:  # Windows
        return min(64, MOST_OPEN)
    return min(max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16), MOST_OPEN)


def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [target], offset)


def seek_and_read(descriptor: int, target: memoryview, offset: int) -> int:
    """Read bytes at an offset, one thread at a time; returns how many."""
    with _seek_lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        content = os.read(descriptor, len(target))
    target[: len(content)] = content
    return len(content)


_seek_lock = free_at_forks(threading.Lock())

read_at = _read_at if hasattr(os, "preadv") else seek_and_read  # seek_and_read on Windows
