"""A shard: the features of many images in one HDF5 file, written once and never changed.

Datasets, for n images: `levels/0` ... (n, c, h, w) float16 or float32 at native resolution, one image a chunk, not
compressed; `image` (n, d) float32; `keys` and `digests`, UTF-8 of fixed length; `checksums` (n, 2 + L) uint64, of
xxh3-64: over key and digest, over the image feature, then over each level. The newest HDF5 file format is used because
it also has checksums over its own structures.

Where a gallery recomputes its patches there are no levels, but `sources`, the path of each image file, UTF-8 of fixed
length; it counts into the first checksum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import CorruptGalleryError
from ..extractors.features import Features
from ..extractors.spec import ExtractorSpec
from ..options import Patches

DAMAGED_NAMES = "key, digest or path is not what was written (checksum)"
DAMAGED_IMAGE = "image feature is not what was written (checksum)"

NAMES = ("keys", "digests", "sources")  # columns of text; the last where there are no levels


def checksums(key: str, digest: str, features: Features, row: int, source: str | None = None) -> list[int]:
    """Return the checksums of one image: of its names, of the image feature, then of levels."""
    arrays = [features.image[row], *(level[row] for level in features.levels)]
    return [_of_names(key, digest, source), *(xxhash.xxh3_64_intdigest(array.data) for array in arrays)]


def _of_names(key: str, digest: str, source: str | None) -> int:
    return _of_texts([text.encode() for text in (key, digest, source) if text is not None])


def _of_texts(texts: Sequence[bytes]) -> int:
    return int(xxhash.xxh3_64_intdigest(b"\0".join(texts) + b"\0"))


def names_of(patches: Patches) -> tuple[str, ...]:
    """Return which of NAMES a shard has."""
    return NAMES if patches == "recompute" else NAMES[:-1]


class Names:
    """The keys, digests and, where there are no levels, paths of a shard as they are stored; column by column."""

    def __init__(self, path: Path, columns: Sequence[NDArray[np.bytes_]], checksums: NDArray[np.uint64]) -> None:
        self._path = path
        self._columns = columns  # (n,) UTF-8 each
        self._checksums = checksums  # (n,)

    def column(self, number: int) -> NameColumn:
        """Return one column, each text of which is compared with the checksum when it is read."""
        return NameColumn(self, self._columns[number])

    def differ(self, row: int) -> bool:
        """Tell whether the names of an image are not what was written, in 2 us."""
        return _of_texts([column[row] for column in self._columns]) != int(self._checksums[row])

    def check(self, row: int) -> None:
        """Compare the names of an image with their checksum.

        Raises:
            CorruptGalleryError: they are not what was written.
        """
        if self.differ(row):
            raise CorruptGalleryError(f"{self._path}: image {self.shown(row)!r}: {DAMAGED_NAMES}")

    def were(self, row: int, key: str, digest: str, source: str | None) -> bool:
        """Tell whether these are the names that the checksum of an image was made of."""
        return _of_names(key, digest, source) == int(self._checksums[row])

    def shown(self, row: int) -> str:
        """Return a key for people, whatever has become of it."""
        return self.all_shown(row)[0]

    def all_shown(self, row: int) -> list[str]:
        """Return key, digest and, where there is one, path, whatever has become of them."""
        return [bytes(column[row]).decode(errors="backslashreplace") for column in self._columns]


class NameColumn(Sequence[str]):
    """The keys, digests or paths of a shard as they are stored: opening one for one key makes no string of the rest."""

    def __init__(self, names: Names, stored: NDArray[np.bytes_]) -> None:
        self._names = names
        self.stored = stored  # (n,) UTF-8

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, row: Any) -> Any:
        """Return the text of a row.

        Raises:
            CorruptGalleryError: it is not what was written.
        """
        self._names.check(row)
        return self.stored[row].decode()


def _level_shapes(spec: ExtractorSpec, patches: Patches) -> tuple[tuple[int, int, int], ...]:
    return spec.level_shapes if patches == "stored" else ()


def dataset_of(file: Any, name: str, file_size: int) -> Any:
    """Open a dataset of a shard: HDF5 itself would follow links into other files, and believe any size in a header.

    Args:
        file: the open h5py file.
        name: of the dataset.
        file_size: bytes.

    Raises:
        ValueError: it is not there, not within this file, or said to be larger than the file.
    """
    steps = name.split("/")
    for end in range(1, len(steps) + 1):
        part = "/".join(steps[:end])
        if not isinstance(link := file.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{name}: expected it in this file, found {'nothing' if link is None else 'a link'}")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise ValueError(f"{name}: expected a dataset, found none")
    made = dataset.id.get_create_plist()
    if made.get_external_count() or made.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        raise ValueError(f"{name}: expected it in this file, found that it is elsewhere")
    if (size := math.prod(dataset.shape) * dataset.dtype.itemsize) > file_size:
        raise ValueError(f"{name}: expected at most the file's {file_size} bytes, found a header that says {size}")
    return dataset


def is_whole(level: Array, checksum: int) -> bool:
    """Tell whether a level of an image is what its checksum was made of."""
    return bool(xxhash.xxh3_64_intdigest(level.data) == checksum)


def damaged_level(path: Path, key: str, number: int) -> CorruptGalleryError:
    """Return the error that says so where it is not."""
    return CorruptGalleryError(f"{path}: image {key!r}: level {number} is not what was written (checksum)")
