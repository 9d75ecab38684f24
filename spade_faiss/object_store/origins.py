"""remote.json in a gallery's folder: which commits of which stores it has been pushed to, or pulled from.

A push replaces only what this folder pushed or pulled last, so that it cannot undo what another folder has pushed.
"""

from __future__ import annotations

import json
from pathlib import Path

import filelock

from ..system.atomic_files import storage_errors, write_whole

FILE = "remote.json"
LOCK = "remote.lock"
SHARDS = "shards"  # for file_at: one checksum over all of them
KEPT = 2  # commits of each address: the one that is there, and the one that a push is about to make


def file_at(name: str, address: Path) -> str:
    """Return the key under which the content of a folder's file is remembered that was pushed or pulled at an address.

    Args:
        name: gallery.json, a file beside it, or SHARDS.
        address: of the store.
    """
    return f"{name} at {address}"


def remembered(folder: Path, key: str) -> list[str]:
    """Return the checksums that a folder remembers, the latest one last.

    Args:
        folder: of the gallery.
        key: an address, for the commits that were pushed there or pulled from there; or file_at.
    """
    found = _read(folder).get(key, [])
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def remember(folder: Path, key: str, checksum: str, alone: bool = False) -> None:
    """Remember a checksum.

    Args:
        folder: of the gallery.
        key: see remembered.
        checksum: xxh3-128.
        alone: forget the one before; else both count, as what is about to happen may fail.

    Raises:
        GalleryError: the folder cannot be written.
    """
    with storage_errors(f"cannot write {folder / FILE}"), filelock.FileLock(folder / LOCK):
        before = [] if alone else [one for one in remembered(folder, key) if one != checksum]
        wanted = [*before[1 - KEPT :], checksum]
        if remembered(folder, key) != wanted:
            write_whole(folder / FILE, json.dumps({**_read(folder), key: wanted}, indent=1).encode())


def _read(folder: Path) -> dict[str, object]:
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):  # without it, a push asks for replace=True
        return {}
    return found if isinstance(found, dict) else {}
