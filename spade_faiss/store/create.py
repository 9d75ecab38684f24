"""Making the folder of an empty gallery, and taking one away that never held anything."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from ..errors import GalleryError, GalleryLockedError
from ..system.atomic_files import TEMPORARY, flush_to_disk, storage_errors
from ..system.failpoints import failpoint
from .locks import HOLDER, READERS, WRITER, WriterLock
from .manifest import FILE, Manifest

PARTS = ("shards", "index")  # folders in a gallery
SKIPPED = "skipped.jsonl"  # beside them, where images were


def create_folder(folder: Path, manifest: Manifest, timeout: float = 0) -> None:
    """Make the folder of an empty gallery, in one that may hold what a process left that was killed while it did so.

    Raises:
        GalleryLockedError: somebody else is making it, and did not finish within `timeout` seconds.
        GalleryError: something is there already, or the folder cannot be made.
    """
    _check_free(folder)
    there, new = folder.exists(), {folder, *(path for path in folder.parents if not path.exists())}
    with storage_errors(f"cannot make the gallery {folder}"):
        for part in PARTS:
            (folder / part).mkdir(parents=True, exist_ok=True)
            failpoint("made", folder / part)
        with WriterLock(folder, timeout):
            _check_free(folder)  # nobody else has made one meanwhile
            _fill(folder, manifest, new, there)


def _fill(folder: Path, manifest: Manifest, new: set[Path], there: bool) -> None:
    try:
        (folder / READERS).touch()
        failpoint("made", folder / READERS)
        for path in new:  # else a loss of power takes the folder, whatever is in it
            with contextlib.suppress(PermissionError):  # what may not be read cannot be flushed
                flush_to_disk(path.parent)
        manifest.write(folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            folder.mkdir()
        raise


def _check_free(folder: Path) -> None:
    """Refuse a path where something is, other than what is left of making a gallery when that was killed."""
    if not folder.exists():
        return
    known = {*PARTS, READERS, WRITER, HOLDER, FILE + TEMPORARY}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - known or any(folder.glob("*/*")):
        raise GalleryError(f"{folder}: expected nothing, or an empty folder, to make a gallery in, found something")


def discard_folder(folder: Path) -> None:
    """Delete a gallery that has never held anything, unless somebody is writing to it."""
    with contextlib.suppress(GalleryLockedError), WriterLock(folder, timeout=0):
        if not Manifest.read(folder).rows:
            (folder / SKIPPED).unlink(missing_ok=True)
            failpoint("discarding", folder / FILE)
            (folder / FILE).unlink()  # killed from here on, it is as if it was being made
            failpoint("discarded", folder / FILE)
            shutil.rmtree(folder)
