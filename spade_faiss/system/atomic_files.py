"""Files that are complete or absent: written under a temporary name, flushed, renamed. Disk errors in one line."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import GalleryError, OutputError, SpadeError
from .failpoints import failpoint
from .forks import remember

TEMPORARY = ".tmp"


def flush_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, so that they survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its name: flush it, rename it, flush its folder."""
    failpoint("written", path)
    flush_to_disk(temporary)
    failpoint("flushed", path)
    temporary.replace(path)
    failpoint("renamed", path)
    flush_to_disk(path.parent)
    failpoint("published", path)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, which is complete or unchanged at any instant; an error leaves it unchanged."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            failpoint("opened", path)
            yield file
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, which is complete or unchanged at any instant."""
    with whole_file(path) as file:
        file.write(content)


class DeferredErrorFile(io.RawIOBase):
    """A file for HDF5 to write to, which keeps errors of the disk until check() raises them.

    HDF5 cannot close a file that it failed to write: on a full disk it ends the interpreter. So a failed write looks
    like a successful one to HDF5. Call check() before the file gets its name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None
        remember(self)

    def after_fork(self) -> None:
        """Let go of the inherited file: HDF5 would write to it again when the child ends."""
        self._file = Path(os.devnull).open("w+b", buffering=0)  # noqa: SIM115

    def check(self) -> None:
        """Raise the first error of a write.

        Raises:
            OSError: a write failed.
        """
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:  # noqa: D102
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:  # noqa: D102
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        read = self._file.readinto(buffer) or 0
        view = memoryview(buffer).cast("B")
        view[read:] = bytes(len(view) - read)  # zeros where a failed write left bytes out
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        return self._file.seek(offset, whence)

    def tell(self) -> int:  # noqa: D102
        return self._file.tell()

    def close(self) -> None:  # noqa: D102
        self._file.close()
        super().close()


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Raise errors of the disk, from Python, HDF5 or FAISS, as a GalleryError of one line.

    Args:
        doing: what fails, as "cannot write FILE".

    Raises:
        GalleryError: with the cause, and what to do where that is known.
    """
    with _disk_errors(doing, GalleryError):
        yield


@contextlib.contextmanager
def output_errors(doing: str) -> Iterator[None]:
    """Raise errors of the disk as an OutputError of one line; for results, reports, pictures and curves.

    Args:
        doing: what fails, as "cannot write FILE".

    Raises:
        OutputError: with the cause, and what to do where that is known.
    """
    with _disk_errors(doing, OutputError):
        yield


@contextlib.contextmanager
def _disk_errors(doing: str, kind: type[GalleryError | OutputError]) -> Iterator[None]:
    try:
        yield
    except SpadeError:
        raise
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None:  # HDF5 and FAISS put it into the text
            found = re.search(r"errno = (\d+)", str(error))
            number = int(found[1]) if found else None
        reason = os.strerror(number) if number is not None else str(error).splitlines()[0]
        advice = {
            errno.ENOSPC: "free some space and run the same command again",
            errno.EDQUOT: "free some space and run the same command again",
            errno.EFBIG: "raise the limit on file size and run the same command again",
            errno.EACCES: "check who owns it and its permissions",
            errno.EPERM: "check who owns it and its permissions",
            errno.EROFS: "it is on a read-only file system",
        }.get(number or 0)
        raise kind(f"{doing}: {reason}" + (f"; {advice}" if advice else "")) from error
