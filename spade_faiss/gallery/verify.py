"""Every file of a gallery, read and compared with what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptGalleryError
from ..index.image_index import ImageIndex
from ..pyramids.recomputed import Places, missing_sources
from ..store.key_table import KeyTable
from ..store.snapshot import Snapshot
from ..store.trusted import FILE as TRUSTED
from ..store.trusted import read_trusted_file
from ..system.sealed_json import read_sealed

CALIBRATION = "calibration.json"
COMPARED = 4096  # vectors of a flat index that are compared at a time


@dataclass(frozen=True)
class Problem:
    """Something that verify found.

    Attributes:
        file: of the gallery; or the image file that patches are recomputed from.
        message: one line.
        key: the image's, if it is about one image.

    Example:
        >>> from pathlib import Path
        >>> next(Path("toy.gallery/index").glob("keys-*")).unlink()
        >>> [problem.message for problem in gallery.verify()]
        ['...keys-...npy: ...']
    """

    file: str
    message: str
    key: str | None = None

    @property
    def is_of_images(self) -> bool:
        """Whether files of images can mend it, unlike what people or a calibration have said of them."""
        return self.file not in (TRUSTED, CALIBRATION)

    @property
    def what(self) -> str:
        """The former name of `message`."""
        return self.message


def problems_of(snapshot: Snapshot, files: bool, normal: Places) -> list[Problem]:
    """Read everything; see GalleryReader.verify."""
    problems: list[Problem] = []
    manifest = snapshot.manifest
    for number, entry in enumerate(manifest.shards):
        try:
            found = list(snapshot.shard(number).problems())
        except CorruptGalleryError as error:
            problems.append(Problem(entry.file, str(error)))
        else:
            problems += [Problem(entry.file, message, key) for key, message in found]
    damaged = bool(problems)
    if files and not damaged:  # a damaged shard does not say reliably where a file is
        problems += [
            Problem(str(snapshot.source(row_id)), str(error), *snapshot.keys([row_id]))
            for row_id, error in missing_sources(snapshot, normal)
        ]
    index, table = None, None
    try:
        index = snapshot.indexes.load_image_index() if manifest.index is not None else None
    except CorruptGalleryError as error:
        problems.append(Problem(manifest.index.file if manifest.index else "", str(error)))
    try:
        table = snapshot.indexes.load_key_table() if manifest.keys is not None else None
    except CorruptGalleryError as error:
        problems.append(Problem(manifest.keys.file if manifest.keys else "", str(error)))
    if not damaged:
        problems += foreign_shards(snapshot, index, table)
    for name, check in ((TRUSTED, read_trusted_file), (CALIBRATION, lambda path: read_sealed(path, "calibrate again"))):
        try:
            check(snapshot.files.path(name))
        except CorruptGalleryError as error:
            problems.append(Problem(name, str(error)))
    return problems


def foreign_shards(snapshot: Snapshot, index: ImageIndex | None, table: KeyTable | None) -> Iterator[Problem]:
    """Yield the shards whose images are not those of the image index and the key table.

    A shard of another gallery may have the size of the one whose place it took, and is whole by its own checksums. The
    key table has a hash of each key. A flat index has each image feature; other kinds are not compared. It takes a pass
    over the keys and the index, a shard or COMPARED vectors at a time, and 50 bytes an image for hashes and ids.

    Args:
        snapshot: whose shards are undamaged.
        index: as its file has it; None: there is none.
        table: likewise.
    """
    first = 0
    hashes, differ = _hashes_by_id(table), _differing_features(snapshot, index)
    for entry in snapshot.manifest.shards:
        rows, kept = slice(first, first + entry.images), ~entry.removed_mask
        of = hashes[rows]
        stored = snapshot.rows.names(first, entry.images).column(0).stored[: len(of)].tolist()
        other_keys = _hashes_by_id(KeyTable().extended(stored)) != of
        if (other_keys & kept[: len(of)]).any() or (differ[rows] & kept).any():
            yield Problem(
                entry.file,
                f"{snapshot.folder / entry.file}: expected the images that key table and image index have, found "
                "others; if it is a shard of another gallery put its own back, else rebuild both by repair",
            )
        first += entry.images


def _hashes_by_id(table: KeyTable | None) -> NDArray[np.uint64]:
    """Return the hashes of keys by id; the table may lack the last ones."""
    hashes, ids = (table or KeyTable()).hashes()
    by_id = np.zeros(len(ids), np.uint64)
    by_id[ids.astype(np.int64)] = hashes
    return by_id


def _differing_features(snapshot: Snapshot, index: ImageIndex | None) -> NDArray[np.bool_]:
    """Return whether a flat index has another image feature than the shard, by id; False where it is not flat."""
    differ, entry = np.zeros(snapshot.manifest.rows, np.bool_), snapshot.manifest.index
    if entry is None or index is None:
        return differ
    for first in range(0, entry.images, COMPARED):
        some = index.stored(first, min(COMPARED, entry.images - first))
        if some is None:
            break
        found = np.array([xxhash.xxh3_64_intdigest(vector.data) for vector in some], np.uint64)
        ids = np.arange(first, first + len(found))
        differ[ids] = found != snapshot.rows.image_checksums(ids)
    return differ
