"""Reads one shard, and compares every read with its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import CorruptGalleryError, first_line
from .damage import damaged
from .file_pool import PooledFile
from .level_reader import LevelReader
from .shard_format import (
    DAMAGED_IMAGE,
    DAMAGED_NAMES,
    Names,
    ShardSchema,
    StoredDataset,
    damaged_level,
    dataset_of,
    is_whole,
    open_hdf5,
)

T = TypeVar("T")


class ShardReader:
    """Reads one shard, and compares every read with its checksum."""

    def __init__(self, path: Path, schema: ShardSchema, images: int, size: int, opened: Any = None) -> None:
        """Open a shard.

        Args:
            path: its file.
            schema: what it holds.
            images: number of its rows.
            size: of its file, in bytes.
            opened: a file of Python that HDF5 reads in its place; None: the path.

        Raises:
            CorruptGalleryError: the file is missing, cut short, or does not hold what the manifest says.
        """
        self.path = path
        self._schema = schema
        self._size = size
        try:
            if opened is None and (found := path.stat().st_size) != size:
                raise damaged(path, f"expected {size} bytes, found {found}")
            self._file: Any = open_hdf5(opened or path)
            self._levels = [
                self._dataset(f"levels/{number}", (images, *shape), schema.spec.dtype)
                for number, shape in enumerate(schema.level_shapes)
            ]
            self._image: Any = self._dataset("image", (images, schema.spec.image_dim), "float32")
            checksums = self._dataset("checksums", (images, 2 + len(self._levels)), "uint64")
            self._checksums: NDArray[np.uint64] = checksums.read()
            columns = [self._column(name, images) for name in schema.columns]
            self.names = Names(path, columns, self._checksums[:, 0])
            self.keys, self.digests = self.names.column(0), self.names.column(1)
            self.sources = None if schema.has_levels else self.names.column(2)  # paths of the image files
        except CorruptGalleryError:
            raise
        except FileNotFoundError as error:
            raise damaged(path, f"expected a shard of {images} images, found nothing there", error) from error
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            # An error of the system has a number; that of HDF5 about the content has none.
            what = "cannot be opened" if getattr(error, "errno", None) else "damaged"
            raise damaged(path, f"{what}: {first_line(error)}", error) from error

    def _dataset(self, name: str, shape: tuple[int, ...], dtype: str) -> StoredDataset:
        dataset = dataset_of(self._file, name, self._size)
        if (dataset.shape, dataset.dtype) != (shape, np.dtype(dtype)):
            raise ValueError(f"{name}: expected {shape} {dtype}, found {dataset}")
        return dataset

    def _column(self, name: str, images: int) -> NDArray[np.bytes_]:
        dataset = dataset_of(self._file, name, self._size)
        if dataset.shape != (images,) or dataset.dtype.kind != "S":
            raise ValueError(f"{name}: expected {images} of fixed length, found {dataset}")
        return dataset.read()

    def close(self) -> None:
        """Close the file. A LevelReader of it goes on reading."""
        self._file, self._image, self._levels = None, None, []

    def image_feature(self, row: int) -> Array:
        """Read one image feature, (d,) float32.

        Raises:
            CorruptGalleryError: it cannot be read, or is not what was written.
        """
        feature = np.empty(self._image.shape[1:], np.float32)
        self._read("image features", lambda: self._image.read_row(row, feature))
        if xxhash.xxh3_64_intdigest(feature.data) != self._checksums[row, 1]:
            raise damaged(self.path, f"image {self.names.shown(row)!r}: {DAMAGED_IMAGE}")
        return feature

    def reader(self, key: Callable[[int], str], open_file: Callable[[], PooledFile]) -> LevelReader:
        """Return a reader of the levels without HDF5, for any number of threads, which outlives close().

        Args:
            key: returns the key of the image in a row, for errors.
            open_file: opens the shard's file.

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
            CorruptGalleryError: they cannot be read, or, with `verify`, are not what was written.
        """
        for number, (dataset, target) in enumerate(zip(self._levels, out, strict=True)):
            self._read(f"level {number}", lambda: dataset.read_row(row, target))  # noqa: B023 (called at once)
            if verify and not is_whole(target, self._checksums[row, 2 + number]):
                raise damaged_level(self.path, self.names.shown(row), number)

    def read(self, row: int) -> list[Array]:
        """Read the levels of one image, [(c, h, w), ...]: [] from a shard without levels. Raises as read_into."""
        out = [np.empty(shape, self._schema.spec.dtype) for shape in self._schema.level_shapes]
        self.read_into(row, out)
        return out

    def problems(self) -> Iterator[tuple[str, str]]:
        """Check every image; yields (key, what is wrong), at most one for each image."""
        for row, what in self.damaged().items():
            yield self.names.shown(row), what

    def damaged(self) -> dict[int, str]:
        """Check every image; returns what is wrong with each damaged row. Damaged names are named before other damage.

        Raises:
            CorruptGalleryError: the image features cannot be read.
        """
        image: Array = self._read("image features", self._image.read)
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
        """Return the rows whose image features do not match their checksums."""
        found = np.array([xxhash.xxh3_64_intdigest(feature.data) for feature in image], np.uint64)
        differing: list[int] = np.flatnonzero(found != self._checksums[:, 1]).tolist()
        return differing

    def _read(self, what: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except (OSError, RuntimeError) as error:
            raise damaged(self.path, f"{what} cannot be read: {first_line(error)}", error) from error
