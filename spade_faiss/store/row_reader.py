"""Reads image features and names of any images without HDF5: a few rows from each of a few hundred shards a query.

Each column lies in one piece in its shard. HDF5 says where; after that the system reads rows from the file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..arrays import Ids
from ..errors import CorruptGalleryError, first_line
from ..options import MIB
from ..system.forks import remember
from .damage import damaged
from .file_pool import FilePool, PooledFile
from .manifest import ShardEntry
from .shard_format import Names, ShardSchema, StoredDataset, dataset_of, open_hdf5

BLOCK_BYTES = 16 * MIB
TEXTS = 2**15  # of each kind that are kept: queries ask for the names of the same neighbours again and again


@dataclass(frozen=True)
class _Column:
    """Where a column lies in its file."""

    offset: int
    dtype: Any
    width: int = 1  # values in a row

    def read(self, file: PooledFile, first: int, count: int) -> NDArray[Any]:
        """Read `count` rows from row `first` on, (count, width)."""
        size = self.width * self.dtype.itemsize
        content = bytearray(count * size)
        file.read_into(memoryview(content), self.offset + first * size)
        return np.frombuffer(content, self.dtype).reshape(count, self.width)


@dataclass(frozen=True)
class _Place:
    """Where a shard's columns lie, and the checksums of its image features, (n,)."""

    path: Path
    size: int  # of the file
    image: _Column
    image_checksums: NDArray[np.uint64]
    checksums: _Column
    names: tuple[_Column, ...]

    def names_of(self, file: PooledFile, first: int, count: int) -> Names:
        """Read the names of `count` images from row `first` on."""
        try:
            columns = [column.read(file, first, count)[:, 0] for column in self.names]
            return Names(self.path, columns, self.checksums.read(file, first, count)[:, 0])
        except OSError as error:
            raise self.unreadable(f"names of images {first} to {first + count - 1}", error) from error

    def unreadable(self, what: str, error: OSError) -> CorruptGalleryError:
        return damaged(self.path, f"{what} cannot be read: {error.strerror or error}", error)


class RowReader:
    """Reads the image features and names of one snapshot by id. Threads may share one.

    It keeps 8 bytes of each image of the shards that it has read from, and the last texts.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardEntry], schema: ShardSchema, files: FilePool) -> None:
        """Read from shards.

        Args:
            folder: of the gallery.
            shards: in the order of ids.
            schema: what they hold.
            files: opens them.
        """
        self._folder = folder
        self._shards = shards
        self._d = schema.spec.image_dim
        self._columns = schema.columns
        self._files = files
        self._starts = np.array([0, *accumulate(shard.images for shard in shards)], np.int64)
        self._places: dict[int, _Place] = {}
        self._texts: dict[str, dict[int, str]] = {name: {} for name in self._columns}
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock."""
        self._lock = threading.Lock()

    def read(self, ids: Ids) -> NDArray[np.float32]:
        """Read the image features of ids (n,), which may be of removed images: (n, d) float32.

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written, naming file and row.
        """
        out = np.empty((len(ids), self._d), np.float32)
        content, size, current = out.reshape(-1).view(np.uint8).data, 4 * self._d, -1
        order, numbers, rows = self._on_disk(ids)
        # A search by codes reads a few hundred rows, hardly two of one shard: the work for each row counts.
        for at, number, row in zip(order.tolist(), numbers.tolist(), rows.tolist(), strict=True):
            if number != current:
                place, file, current = *self._open(number), number
            target = content[at * size : (at + 1) * size]
            try:
                file.read_into(target, place.image.offset + row * size)
            except OSError as error:
                raise place.unreadable(f"image feature {row}", error) from error
            if xxhash.xxh3_64_intdigest(target) != place.image_checksums[row]:
                raise damaged(place.path, f"image feature {row} is not what was written (checksum)")
        return out

    def texts(self, ids: Ids, name: str) -> list[str]:
        """Return the texts of ids (n,), which may be of removed images, in one of the columns NAMES.

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written.
        """
        if len(ids) > TEXTS:
            return self._read_texts(ids, name)
        wanted, kept = ids.tolist(), self._texts[name]
        if missing := [one for one in dict.fromkeys(wanted) if one not in kept]:
            found = dict(zip(missing, self._read_texts(np.array(missing), name), strict=True))
            if len(kept) + len(found) > TEXTS:  # replaced, not emptied: another thread may be looking into it
                kept = self._texts[name] = {one: kept[one] for one in wanted if one in kept}
            kept.update(found)
        return [kept[one] for one in wanted]

    def _read_texts(self, ids: Ids, name: str) -> list[str]:
        """Read texts of ids (n,); rows beside each other at once."""
        column = self._columns.index(name)
        texts = [""] * len(ids)
        order, numbers, rows = self._on_disk(ids)
        runs = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(rows) > 1)) + 1
        for run in np.split(np.arange(len(order)), runs) if len(order) else []:
            first, last = int(rows[run[0]]), int(rows[run[-1]])
            place, file = self._open(int(numbers[run[0]]))
            found = place.names_of(file, first, last + 1 - first).column(column)
            for at, row in zip(order[run].tolist(), rows[run].tolist(), strict=True):
                texts[at] = found[row - first]
        return texts

    def names(self, row_id: int, count: int = 1) -> Names:
        """Return the names of `count` images of one shard from an id on, even if they are damaged.

        Raises:
            CorruptGalleryError: they cannot be read.
        """
        _, [number], [row] = self._on_disk(np.array([row_id]))
        place, file = self._open(int(number))
        return place.names_of(file, int(row), count)

    def image_checksums(self, ids: Ids) -> NDArray[np.uint64]:
        """Return the checksums of the image features of ids, (n,)."""
        order, numbers, rows = self._on_disk(ids)
        found = np.empty(len(ids), np.uint64)
        for number in np.unique(numbers).tolist():
            at = numbers == number
            found[order[at]] = self._open(number)[0].image_checksums[rows[at]]
        return found

    def checksums(self, ids: Ids) -> NDArray[np.uint64]:
        """Read the checksums of ids (n,), (n, 2 + L): of names, image feature and each stored level.

        Raises:
            CorruptGalleryError: they cannot be read.
        """
        order, numbers, rows = self._on_disk(ids)
        found: list[NDArray[np.uint64]] = []
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            place, file = self._open(number)
            try:
                found.append(place.checksums.read(file, row, 1))
            except OSError as error:
                raise place.unreadable(f"checksums of image {row}", error) from error
        return np.concatenate(found)[np.argsort(order)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self, start: int = 0) -> Iterator[NDArray[np.float32]]:
        """Read the image features of ids from `start` on, in blocks (n, d) of 16 MiB; raises as read."""
        step = max(1, BLOCK_BYTES // (4 * self._d))
        for first in range(start, len(self), step):
            yield self.read(np.arange(first, min(first + step, len(self))))

    def _on_disk(self, ids: Ids) -> tuple[Ids, Ids, Ids]:
        """Return the order in which ids lie on the disk and, in that order, the numbers of their shards and rows."""
        order = np.argsort(ids)
        ids = ids[order]
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        if self._files.prefetch is not None:
            self._files.prefetch(self._folder / self._shards[number].file for number in np.unique(numbers))
        return order, numbers, ids - self._starts[numbers]

    def _open(self, number: int) -> tuple[_Place, PooledFile]:
        place = self._places.get(number)
        if place is None:
            with self._lock:
                if number not in self._places:
                    self._places[number] = self._find(number)
                place = self._places[number]
        return place, self._files.open(number, place.path, place.size)

    def _find(self, number: int) -> _Place:
        entry = self._shards[number]
        path, n = self._folder / entry.file, entry.images
        opened = self._files.open(number, path, entry.bytes)  # checks that it exists and has that size
        try:
            file = open_hdf5(opened.for_hdf5())
            kinds = {"image": "f", "checksums": "u", **dict.fromkeys(self._columns, "S")}
            datasets = {name: dataset_of(file, name, entry.bytes) for name in kinds}
            columns = {name: _column(dataset, name, n, kinds[name]) for name, dataset in datasets.items()}
            if (columns["image"].width, columns["image"].dtype) != (self._d, np.float32):
                raise ValueError(f"image: expected ({n}, {self._d}) float32, found {datasets['image']}")
            if columns["checksums"].width < 2:
                raise ValueError(f"checksums: expected at least ({n}, 2), found {datasets['checksums']}")
            names = tuple(columns[name] for name in self._columns)
            of_images = datasets["checksums"].read()[:, 1].copy()
            return _Place(path, entry.bytes, columns["image"], of_images, columns["checksums"], names)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise damaged(path, f"damaged: {first_line(error)}", error) from error


def _column(dataset: StoredDataset, name: str, n: int, kind: str) -> _Column:
    """Return where a column of n rows lies.

    Raises:
        ValueError: the dataset is something else, or not in one piece.
    """
    ndim = 1 if kind == "S" else 2
    offset = dataset.id.get_offset()
    if (len(dataset.shape), dataset.shape[0], dataset.dtype.kind) != (ndim, n, kind) or offset is None:
        raise ValueError(f"{name}: expected {n} rows in one piece, found {dataset}")
    return _Column(offset, dataset.dtype, int(np.prod(dataset.shape[1:])))
