"""Files that are whole or not there: flushed, renamed, and the errors of the disk in one line."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import GalleryError, SpadeError
from .failpoints import failpoint
from .forks import remember

TEMPORARY = ".tmp"


def flush_to_disk(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its name: flushed first, renamed, then the name itself flushed."""
    failpoint("written", path)
    flush_to_disk(temporary)
    failpoint("flushed", path)
    temporary.replace(path)
    failpoint("renamed", path)
    flush_to_disk(path.parent)
    failpoint("published", path)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that is at any instant either as it was or complete; left by an error, it is as it was."""
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
    """Write a file that is at any instant either as it was or as given here."""
    with whole_file(path) as file:
        file.write(content)


class DeferredErrorFile(io.RawIOBase):
    """A file for HDF5 to write to, whose errors are kept until they are asked for.

    HDF5 cannot close a file that it failed to write, and takes the interpreter down with it on a full disk. So a write
    that fails is reported to it as done; check() tells the truth, before the file is given its name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None
        remember(self)

    def after_fork(self) -> None:
        """Let go of the file in a forked process, where HDF5 would write to it once more at the end."""
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
        view[read:] = bytes(len(view) - read)  # what a failed write left out
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
    """Turn errors of the disk, from Python, HDF5 or FAISS, into one line that says what was being done.

    Raises:
        GalleryError: with the cause, and what to do where that is known.
    """
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
        raise GalleryError(f"{doing}: {reason}" + (f"; {advice}" if advice else "")) from error
