"""Files that are whole or not there: flushed, renamed, and the errors of the disk in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import GalleryError, SpadeError

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
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is at any instant either as it was or as given here."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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
