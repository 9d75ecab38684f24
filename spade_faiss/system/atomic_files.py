"""Files that are complete or absent: written under a temporary name, flushed, renamed. Disk errors in one line."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import GalleryError, OutputError, SpadeError
from .failpoints import failpoint
from .forks import remember

TEMPORARY = ".tmp"
PENDING = 2**23  # bytes that are put together before they are written


def flush_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, so that they survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its name: flush it, rename it, flush its folder; see file_to_write."""
    path = file_to_write(path)
    failpoint("written", path)
    flush_to_disk(temporary)
    failpoint("flushed", path)
    temporary.replace(path)
    failpoint("renamed", path)
    flush_to_disk(path.parent)
    failpoint("published", path)


def file_to_write(path: Path) -> Path:
    """Return the file that a path stands for, which a link leads to, whether it exists or not.

    Raises:
        OutputError: something is there that a file must not take the place of: a pipe, a socket or a device.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OutputError(f"{path}: expected a file, or a name that is free, found a pipe or a device; name another")
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, which is complete or unchanged at any instant; an error leaves it unchanged.

    Raises:
        OutputError: see file_to_write.
    """
    path = file_to_write(path)
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

    What is written on and on is put together: each call of the disk hands the interpreter to other threads, and a
    thread that computes gives it back milliseconds later.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w+b", buffering=0)
        self._at = 0  # where is read and written next
        self._pending = bytearray()  # written, but not to the disk
        self._start = 0  # where that begins
        self._error: OSError | None = None
        remember(self)

    def after_fork(self) -> None:
        """Let go of the inherited file: HDF5 would write to it again when the child ends."""
        self._pending.clear()
        self._file = Path(os.devnull).open("w+b", buffering=0)  # noqa: SIM115

    def check(self) -> None:
        """Raise the first error of a write.

        Raises:
            OSError: a write failed.
        """
        self.flush()
        if self._error is not None:
            raise self._error

    def flush(self) -> None:  # noqa: D102
        pending, self._pending = self._pending, bytearray()
        rest = memoryview(pending)
        try:
            if rest and self._error is None:
                self._file.seek(self._start)
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error

    def write(self, data: Any) -> int:  # noqa: D102
        if self._at != self._start + len(self._pending) or len(self._pending) >= PENDING:
            self.flush()
        if not self._pending:
            self._start = self._at
        view = memoryview(data).cast("B")
        self._pending += view
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:  # noqa: D102
        self.flush()
        try:
            return self._file.truncate(self._at if size is None else size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        self.flush()
        view = memoryview(buffer).cast("B")
        self._file.seek(self._at)
        read = self._file.readinto(view) or 0
        view[read:] = bytes(len(view) - read)  # zeros where a failed write left bytes out
        self._at += read
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        if whence == os.SEEK_END:
            self.flush()
            offset += self._file.seek(0, os.SEEK_END)
        self._at = offset + self._at if whence == os.SEEK_CUR else offset
        return self._at

    def tell(self) -> int:  # noqa: D102
        return self._at

    def close(self) -> None:  # noqa: D102
        if not self.closed:
            self.flush()
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


def write_json(path: Path, values: Any, indent: int | None = None) -> None:
    """Write values as JSON; after an error, the file is as it was."""
    write_whole(path, (json.dumps(values, indent=indent) + "\n").encode())


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV in UTF-8, with escapes for names whose bytes are no text; after an error, it is as it was."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode(errors="backslashreplace"))
