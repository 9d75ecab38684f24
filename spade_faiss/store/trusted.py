"""Trusted images of a gallery: those that a person looked at and confirmed as normal. They lie in trusted.json.

An image is trusted by its key and the digest of its content. What later takes its key's place is another image, and an
entry whose image is not in the gallery has no effect: it may be written before the image's commit, so that no
generation has the image without the trust.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from ..arrays import Ids
from ..errors import CorruptGalleryError, OptionError
from ..images.keys import comparable
from ..images.tiling import image_key, listed_keys, place_of
from ..system.atomic_files import storage_errors, write_whole
from ..system.sealed_json import read_format, sealed
from .snapshot import Snapshot

FILE = "trusted.json"
LOCK = "trusted.lock"
FORMAT = "spade-faiss trusted images"
FORMAT_VERSION = 1

Trusted = Mapping[str, str]  # digests by key


def read_trusted(folder: Path) -> dict[str, str]:
    """Return the digests of a gallery's trusted images by key; empty: it has none.

    Raises:
        CorruptGalleryError: the file was damaged or edited, or is of another format version.
    """
    return read_trusted_file(folder / FILE)


def read_trusted_file(path: Path) -> dict[str, str]:
    """Return what read_trusted does, of a file wherever it lies."""
    mend = "delete it, and trust the images again"
    values = read_format(path, FORMAT, FORMAT_VERSION, mend)
    if values is None:
        return {}
    images = values.get("images")
    if not isinstance(images, dict) or not all(isinstance(digest, str) for digest in images.values()):
        raise CorruptGalleryError(f"{path}: expected digests by key, found something else; {mend}")
    return images


def change_trusted(folder: Path, add: Trusted | None = None, drop: Collection[str] = (), tiles: bool = False) -> None:
    """Trust images, and trust others no longer.

    Args:
        folder: of the gallery.
        add: digests by key.
        drop: keys, in any form of Unicode normalisation; those that are not trusted are passed over.
        tiles: whether images are in tiles: earlier releases trusted a single tile, which is dropped with its image.

    Raises:
        CorruptGalleryError: as read_trusted.
        GalleryError: the file cannot be written.
    """
    if not add and not drop:
        return
    # Not the writer's lock, which may be held for hours.
    with storage_errors(f"cannot write {folder / FILE}"), filelock.FileLock(folder / LOCK):
        old, gone = read_trusted(folder), set(map(comparable, drop))
        new = {
            key: digest
            for key, digest in old.items()
            if gone.isdisjoint((comparable(key), comparable(image_key(key) if tiles else key)))
        } | dict(add or {})
        if new == old:
            return
        values: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "images": new}
        write_whole(folder / FILE, sealed(values))


def given_images(snapshot: Snapshot, keys: Iterable[str]) -> list[int]:
    """Return the ids of images by the keys that a caller gave; of those in tiles, of their first tiles.

    Raises:
        OptionError: a key that is not in the gallery, or is that of a further tile; or as listed_keys.
    """
    keys = listed_keys(keys)
    found = snapshot.find_all(keys)
    if None in found:
        key = keys[found.index(None)]
        raise OptionError(f"{snapshot.folder}: expected keys of images in it, found {key!r}, which is not")
    if snapshot.manifest.spec.tile is not None and (tile := next((key for key in keys if place_of(key)), None)):
        raise OptionError(
            f"{snapshot.folder}: expected keys of whole images, found {tile!r}, a tile of one; give {image_key(tile)!r}"
        )
    return [row_id for row_id in found if row_id is not None]


def trusted_ids(snapshot: Snapshot, trusted: Trusted) -> Ids:
    """Return the ids of the images of a snapshot that are trusted, ascending."""
    if not trusted:
        return np.empty(0, np.int64)
    found = dict(zip(trusted, snapshot.find_all(list(trusted)), strict=True))
    there = {key: row_id for key, row_id in found.items() if row_id is not None}
    digests = snapshot.digests(list(there.values()))
    same = [row_id for (key, row_id), digest in zip(there.items(), digests, strict=True) if digest == trusted[key]]
    return np.array(sorted(set(same)), np.int64)  # an earlier release kept an image under each form of its key
