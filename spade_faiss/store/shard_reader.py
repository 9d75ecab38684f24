"""Reads one shard; every read is compared with its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import CorruptGalleryError
from ..extractors.spec import ExtractorSpec
from ..options import Patches
from .file_pool import PooledFile
from .level_reader import LevelReader
from .shard_format import (
    DAMAGED_IMAGE,
    DAMAGED_NAMES,
    Names,
    _level_shapes,
    damaged_level,
    dataset_of,
    is_whole,
    names_of,
)

T = TypeVar("T")


class ShardReader:
    """Reads one shard. Every read is verified against the checksums."""

    def __init__(self, path: Path, spec: ExtractorSpec, images: int, size: int, patches: Patches = "stored") -> None:
        """Open a shard.

        Raises:
            CorruptGalleryError: the file is missing, cut short, or does not hold what the manifest says.
        """
        self.path = path
        self._level_shapes = _level_shapes(spec, patches)
        self._dtype = spec.dtype
        self._size = size
        try:
            found = path.stat().st_size
            if found != size:
                raise CorruptGalleryError(f"{path}: expected {size} bytes, found {found}")
            self._file: Any = h5py.File(path, "r", libver="latest", locking=False)
            expected = [(images, *shape) for shape in self._level_shapes]
            self._levels = [self._dataset(f"levels/{n}", shape, spec.dtype) for n, shape in enumerate(expected)]
            self._image = self._dataset("image", (images, spec.image_dim), "float32")
            self._checksums: NDArray[np.uint64] = self._dataset("checksums", (images, 2 + len(expected)), "uint64")[:]
            columns = [self._column(name, images) for name in names_of(patches)]
            self.names = Names(path, columns, self._checksums[:, 0])
            self.keys, self.digests = self.names.column(0), self.names.column(1)
            # Paths of the image files; None where there are levels instead.
            self.sources = None if patches == "stored" else self.names.column(2)
        except CorruptGalleryError:
            raise
        except FileNotFoundError as error:
            raise CorruptGalleryError(f"{path}: expected a shard of {images} images, found nothing there") from error
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            # The system says why it cannot be opened by a number; what HDF5 makes no sense of has none.
            what = "cannot be opened" if getattr(error, "errno", None) else "damaged"
            raise CorruptGalleryError(f"{path}: {what}: {str(error).splitlines()[0]}") from error

    def _dataset(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        dataset = dataset_of(self._file, name, self._size)
        if (dataset.shape, dataset.dtype) != (shape, dtype):
            raise ValueError(f"{name}: expected {shape} {dtype}, found {dataset.shape} {dataset.dtype}")
        return dataset

    def _column(self, name: str, images: int) -> NDArray[np.bytes_]:
        dataset = dataset_of(self._file, name, self._size)
        if dataset.shape != (images,) or dataset.dtype.kind != "S":
            raise ValueError(f"{name}: expected {images} of fixed length, found {dataset.shape} {dataset.dtype}")
        column: NDArray[np.bytes_] = dataset[:]
        return column

    def close(self) -> None:
        """Close the file; a reader stays good."""
        self._file.close()

    def image_features(self) -> Array:
        """Read all image features, (n, d) float32.

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written.
        """
        image: Array = self._read("image features", lambda: self._image[:])
        for row in self._damaged_images(image):
            raise CorruptGalleryError(f"{self.path}: image {self.names.shown(row)!r}: {DAMAGED_IMAGE}")
        return image

    def image_feature(self, row: int) -> Array:
        """Read one image feature, (d,) float32; raises as image_features."""
        image: Array = self._read("image features", lambda: self._image[row : row + 1])
        if xxhash.xxh3_64_intdigest(image.data) != self._checksums[row, 1]:
            raise CorruptGalleryError(f"{self.path}: image {self.names.shown(row)!r}: {DAMAGED_IMAGE}")
        feature: Array = image[0]
        return feature

    def reader(self, key: Callable[[int], str], open_file: Callable[[], PooledFile]) -> LevelReader:
        """Return what reads the levels without HDF5, from any number of threads, also after close.

        Args:
            key: of the image in a row, for errors.
            open_file: gives the shard's file, to read from it.

        Raises:
            CorruptGalleryError: the levels are not stored as written, or lie outside the file.
        """
        return self._read(
            "where the levels are",
            lambda: LevelReader(self.path, self._size, self._levels, self._checksums[:, 2:].copy(), key, open_file),
        )

    def read_into(self, row: int, out: Sequence[Array], verify: bool = True) -> None:
        """Read the levels of one image, through HDF5, into `out`, contiguous arrays [(c, h, w), ...].

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written (unless `verify` is off).
        """
        for number, (dataset, target) in enumerate(zip(self._levels, out, strict=True)):
            self._read(f"level {number}", lambda: dataset.read_direct(target, np.s_[row]))  # noqa: B023 (called at once)
            if verify and not is_whole(target, self._checksums[row, 2 + number]):
                raise damaged_level(self.path, self.names.shown(row), number)

    def read(self, row: int) -> list[Array]:
        """Read the levels of one image, [(c, h, w), ...]; none where they are recomputed. Raises as read_into."""
        out = [np.empty(shape, self._dtype) for shape in self._level_shapes]
        self.read_into(row, out)
        return out

    def problems(self) -> Iterator[tuple[str, str]]:
        """Check every image; yields (key, what is wrong), at most one for each image."""
        for row, what in self.damaged().items():
            yield self.names.shown(row), what

    def damaged(self) -> dict[int, str]:
        """Check every image; returns for each row that is damaged what is wrong: of its names before all else.

        Raises:
            CorruptGalleryError: the image features cannot be read.
        """
        image: Array = self._read("image features", lambda: self._image[:])
        damaged = dict.fromkeys(self._damaged_images(image), DAMAGED_IMAGE)
        for row in range(len(self.keys)):
            try:
                self.read(row)
            except CorruptGalleryError as error:
                damaged.setdefault(row, str(error))
            if self.names.differ(row):
                damaged[row] = DAMAGED_NAMES
        return dict(sorted(damaged.items()))

    def _damaged_images(self, image: Array) -> list[int]:
        return self._differing(1, [xxhash.xxh3_64_intdigest(feature.data) for feature in image])

    def _differing(self, column: int, found: list[int]) -> list[int]:
        """Return the rows whose checksums of one column are not those found."""
        return [int(row) for row in np.flatnonzero(np.array(found, np.uint64) != self._checksums[:, column])]

    def _read(self, what: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except (OSError, RuntimeError) as error:
            raise CorruptGalleryError(f"{self.path}: {what} cannot be read: {str(error).splitlines()[0]}") from error
