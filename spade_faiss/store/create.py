"""Makes the folder of an empty gallery, and deletes one that never held an image."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from ..errors import GalleryError, GalleryLockedError
from ..system.atomic_files import TEMPORARY, flush_to_disk, storage_errors
from ..system.failpoints import failpoint
from .locks import HOLDER, READERS, WRITER, WriterLock
from .manifest import FILE, Manifest

PARTS = ("shards", "index")  # folders in a gallery's folder
SKIPPED = "skipped.jsonl"  # beside them, if a build skipped images


def create_folder(folder: Path, manifest: Manifest, timeout: float = 0) -> None:
    """Make the folder of an empty gallery. The folder may hold the remains of an earlier call that was killed.

    Raises:
        GalleryLockedError: another process is making it, and did not finish within `timeout` seconds.
        GalleryError: the path exists and is no empty folder, or the folder cannot be made.
    """
    _check_free(folder)
    there, new = folder.exists(), {folder, *(path for path in folder.parents if not path.exists())}
    with storage_errors(f"cannot make the gallery {folder}"):
        for part in PARTS:
            (folder / part).mkdir(parents=True, exist_ok=True)
            failpoint("made", folder / part)
        with WriterLock(folder, timeout):
            _check_free(folder)  # again: another process may have made one meanwhile
            _fill(folder, manifest, new, there)


def _fill(folder: Path, manifest: Manifest, new: set[Path], there: bool) -> None:
    try:
        (folder / READERS).touch()
        failpoint("made", folder / READERS)
        for path in new:  # else a loss of power removes the folder with all its files
            with contextlib.suppress(PermissionError):  # a folder that may not be read cannot be flushed
                flush_to_disk(path.parent)
        manifest.write(folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            folder.mkdir()
        raise


def _check_free(folder: Path) -> None:
    """Refuse a path that exists, unless it is a folder that holds at most the remains of a killed create_folder."""
    if not folder.exists():
        return
    known = {*PARTS, READERS, WRITER, HOLDER, FILE + TEMPORARY}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - known or any(folder.glob("*/*")):
        raise GalleryError(f"{folder}: expected nothing, or an empty folder, to make a gallery in, found something")


def discard_folder(folder: Path) -> None:
    """Delete a gallery that holds no rows, unless another process is writing to it."""
    with contextlib.suppress(GalleryLockedError), WriterLock(folder, timeout=0):
        if not Manifest.read(folder).rows:
            (folder / SKIPPED).unlink(missing_ok=True)
            failpoint("discarding", folder / FILE)
            (folder / FILE).unlink()  # if killed from here on, the folder looks half made
            failpoint("discarded", folder / FILE)
            shutil.rmtree(folder)
