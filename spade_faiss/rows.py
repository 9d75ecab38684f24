"""Image features of any images straight from the shards' files: a few rows of a few hundred files, at each query.

They lie in one piece in each shard. Once HDF5 has said where, the system reads a row without it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from .chunks import dataset_of
from .errors import CorruptGalleryError
from .forks import remember
from .manifest import ShardEntry
from .options import MIB

Ids = NDArray[np.int64]

BLOCK_BYTES = 16 * MIB

MOST_OPEN = 1024  # files held open, where the process may have many
SUPPORTED = hasattr(os, "preadv")  # elsewhere a shard is opened for each row: on Windows


@dataclass(frozen=True)
class _Place:
    """Where a shard's image features are, and their checksums (n,)."""

    path: Path
    size: int  # of the file
    offset: int
    checksums: NDArray[np.uint64]


class _File:
    """A descriptor that is closed when the last thread has done with it."""

    def __init__(self, place: _Place) -> None:
        self.descriptor = os.open(place.path, os.O_RDONLY)
        found = os.fstat(self.descriptor).st_size
        if found != place.size:
            raise CorruptGalleryError(f"{place.path}: expected {place.size} bytes, found {found}")

    def __del__(self) -> None:
        descriptor = self.__dict__.pop("descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def _files_to_hold() -> int:
    """Return how many files to hold open: a sixteenth of what the process may have; three generations may be in use."""
    try:
        import resource
    except ImportError:  # Windows
        return min(64, MOST_OPEN)
    return min(max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16), MOST_OPEN)


class FeatureRows:
    """The image features of one generation, by id. Threads may share one.

    What it keeps of a shard that was read from is 8 bytes an image.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardEntry], d: int) -> None:
        self._folder = folder
        self._shards = shards
        self._d = d
        self._starts = np.array([0, *accumulate(shard.images for shard in shards)], np.int64)
        self._places: dict[int, _Place] = {}
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._room = _files_to_hold()
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Be of use in a forked process, with a lock that nobody holds; the files are read at given places."""
        self._lock = threading.Lock()

    def read(self, ids: Ids) -> NDArray[np.float32]:
        """Read the image features of ids (n,), each from 0 to the number of rows: (n, d) float32.

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written, naming file and row.
        """
        out = np.empty((len(ids), self._d), np.float32)
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        rows = ids - self._starts[numbers]
        order = np.argsort(ids)  # as they lie on the disk
        size, current = 4 * self._d, -1
        for at, number, row in zip(order.tolist(), numbers[order].tolist(), rows[order].tolist(), strict=True):
            if number != current:
                place, file, current = *self._open(number), number
            target = out[at].data.cast("B")
            try:
                done = os.preadv(file.descriptor, [target], place.offset + row * size)
            except OSError as error:
                raise CorruptGalleryError(
                    f"{place.path}: image feature {row} cannot be read: {error.strerror or error}"
                ) from error
            if done != size or xxhash.xxh3_64_intdigest(target) != place.checksums[row]:
                raise CorruptGalleryError(f"{place.path}: image feature {row} is not what was written (checksum)")
        return out

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self, start: int = 0) -> Iterator[NDArray[np.float32]]:
        """Read the image features of ids from `start` on, in blocks (n, d) of a few megabytes; raises as read."""
        step = max(1, BLOCK_BYTES // (4 * self._d))
        for first in range(start, len(self), step):
            yield self.read(np.arange(first, min(first + step, len(self))))

    def _open(self, number: int) -> tuple[_Place, _File]:
        with self._lock:
            file = self._files.get(number)
            if file is None:
                try:
                    if number not in self._places:
                        self._places[number] = self._find(self._shards[number])
                    file = self._files[number] = _File(self._places[number])
                except CorruptGalleryError:
                    raise
                except OSError as error:
                    path = self._folder / self._shards[number].file
                    raise CorruptGalleryError(f"{path}: cannot be opened: {error.strerror or error}") from error
                if len(self._files) > self._room:
                    self._files.popitem(last=False)
            self._files.move_to_end(number)
            return self._places[number], file

    def _find(self, entry: ShardEntry) -> _Place:
        path, expected = self._folder / entry.file, (entry.images, self._d)
        try:
            with h5py.File(path, "r", libver="latest", locking=False) as file:
                image, sums = (dataset_of(file, name, entry.bytes) for name in ("image", "checksums"))
                if sums.dtype != np.uint64:
                    raise ValueError(f"checksums: expected uint64, found {sums.dtype}")
                checksums = sums[:, 1]
                found, offset = (image.shape, image.dtype), image.id.get_offset()
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise CorruptGalleryError(f"{path}: damaged: {str(error).splitlines()[0]}") from error
        if found != (expected, np.float32) or offset is None or checksums.shape != (entry.images,):
            raise CorruptGalleryError(f"{path}: expected image features {expected} in one piece, found {found}")
        return _Place(path, entry.bytes, offset, checksums)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._files.clear()
