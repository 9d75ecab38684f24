"""The user's cache folder: what can be made again, and is kept as that takes long."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .atomic_files import publish


def cache_folder(name: str) -> Path:
    """Return the folder of what is kept under a name, which need not exist.

    Raises:
        OSError: the user has no home folder.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return Path(base, "spade-faiss", name)


@contextlib.contextmanager
def file_to_keep(path: Path) -> Iterator[BinaryIO]:
    """Open a file of the cache to write: it is whole or as it was, also where several processes write it at once.

    Raises:
        OSError: it cannot be written.
        OutputError: see atomic_files.file_to_write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".tmp", path.stem, path.parent)  # a name of its own for each process
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        publish(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def drop_the_oldest(folder: Path, most: int) -> None:
    """Delete all but some files, those that were written last; other processes may do so, too.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-most]:
        with contextlib.suppress(OSError):
            path.unlink()
