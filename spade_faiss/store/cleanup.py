"""Deletes the files of a gallery that no commit names."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import filelock

from ..system.atomic_files import TEMPORARY, storage_errors
from ..system.failpoints import failpoint
from .locks import ReaderLock
from .manifest import FILE, INDEX_NAME, KEYS_NAME, SHARD_NAME, Manifest


def discard_unnamed(folder: Path) -> None:
    """Delete the files that no commit has ever named, which a killed or failed writer leaves. No reader uses them.

    On a full disk the next attempt needs their space.
    """
    manifest = Manifest.read(folder)  # from the disk: a commit may fail after it took effect
    for path in [*folder.glob(FILE + ".*"), *folder.glob("shards/*"), *folder.glob("index/*")]:
        name, number = path.relative_to(folder).as_posix(), int(re.findall(r"\d+", "0" + path.stem)[-1])
        if (
            path.suffix == TEMPORARY
            or (SHARD_NAME.fullmatch(name) and number >= manifest.next_shard)
            or ((INDEX_NAME.fullmatch(name) or KEYS_NAME.fullmatch(name)) and number > manifest.generation)
        ):
            _delete(path)


def sweep(folder: Path, manifest: Manifest) -> None:
    """Delete shards and secondary indexes that the last commit does not name, unless a reader may use them."""
    named = {folder / entry.file for entry in (*manifest.shards, manifest.index, manifest.keys) if entry}
    patterns = ("shards/*.h5", "index/*.faiss", "index/*.npy")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    with contextlib.suppress(BlockingIOError), ReaderLock(folder, exclusive=True):
        for path in sorted(set(found) - named):
            _delete(path)
            failpoint("swept away", path)
        for path in sorted(folder.glob("*" + TEMPORARY)):
            _delete_unless_written(path)


def _delete_unless_written(temporary: Path) -> None:
    """Delete what a killed process has left of a file beside the manifest, each of which has a lock of its own.

    Whoever holds that lock is writing this very file: trusted.json under trusted.lock, and so on.
    """
    lock = filelock.FileLock(temporary.with_name(f"{temporary.name.partition('.')[0]}.lock"), timeout=0)
    try:
        lock.acquire()
    except OSError:  # it is being written, or nothing can be now
        return
    try:
        _delete(temporary)
        failpoint("swept away", temporary)
    finally:
        lock.release()


def _delete(path: Path) -> None:
    """Delete a file; a folder, which no commit has made, stays."""
    if path.is_symlink() or not path.is_dir():
        with storage_errors(f"cannot delete {path}"):
            path.unlink(missing_ok=True)
