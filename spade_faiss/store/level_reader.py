"""Reads a shard's levels without HDF5, whose library admits one thread at a time and copies what it reads.

A level of an image is one chunk, not compressed. HDF5 says where in the file each chunk lies; after that the system
reads it straight into place, for any number of threads at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..system.forks import free_at_forks
from .damage import damaged
from .file_pool import PooledFile
from .shard_format import StoredDataset, damaged_level, is_whole

THREADS = 8  # reading at a time, however few cores there are: a disk serves several requests at once
SUPPORTED = hasattr(os, "preadv") and hasattr(h5py.h5d.DatasetID, "chunk_iter")  # False on Windows, where HDF5 reads

T = TypeVar("T")

_lock = free_at_forks(threading.Lock())
_pools: dict[int, ThreadPoolExecutor] = {}  # by process, because a forked process has none of its parent's threads


class LevelReader:
    """Reads the levels of one shard. Threads may share one; it outlives its ShardReader.

    It keeps 16 bytes for each level of each image.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        datasets: Sequence[StoredDataset],
        checksums: NDArray[np.uint64],
        key: Callable[[int], str],
        open_file: Callable[[], PooledFile],
    ) -> None:
        """Ask HDF5 where every level lies, which takes a millisecond for 1000 chunks.

        Args:
            path: of the shard.
            size: of its file, in bytes.
            datasets: its levels, (n, c, h, w) each.
            checksums: of its levels, (n, L).
            key: returns the key of the image in a row, for errors.
            open_file: opens the file.

        Raises:
            CorruptGalleryError: a level is not one uncompressed chunk an image, or lies outside the file.
        """
        self._path = path
        self._size = size
        self._key = key
        self._checksums = checksums
        self._open_file = open_file
        self._offsets = np.stack([self._find(number, dataset) for number, dataset in enumerate(datasets)])
        self._sizes = [int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize for dataset in datasets]

    @property
    def path(self) -> Path:
        """The shard's file."""
        return self._path

    def extents(self, row: int) -> list[tuple[int, int]]:
        """Return where the levels of one image lie in the file: first byte and number of bytes of each."""
        return [(int(offset), size) for offset, size in zip(self._offsets[:, row], self._sizes, strict=True)]

    def all_extents(self) -> list[tuple[int, int]]:
        """Return where the levels of all images lie, ascending: first byte and number of bytes of each."""
        return sorted(extent for row in range(self._offsets.shape[1]) for extent in self.extents(row))

    def _find(self, number: int, dataset: StoredDataset) -> NDArray[np.int64]:
        """Return where each image's chunk of a level begins in the file, (n,)."""
        n, *shape = dataset.shape
        expected = int(np.prod(shape)) * dataset.dtype.itemsize
        chunks: list[Any] = []
        if dataset.chunks == (1, *shape) and dataset.filters == 0:
            dataset.id.chunk_iter(chunks.append)
        chunks = [chunk for chunk in chunks if chunk.size == expected]
        rows = [chunk.chunk_offset[0] for chunk in chunks]
        if sorted(rows) != list(range(n)):
            raise damaged(
                self._path,
                f"level {number}: expected {n} chunks of {expected} bytes, not compressed, found {len(rows)}",
            )
        offsets = np.empty(n, np.int64)
        for row, chunk in zip(rows, chunks, strict=True):
            if not 0 <= chunk.byte_offset <= self._size - expected:
                raise damaged(
                    self._path,
                    f"level {number} of image {self._key(row)!r}: expected it within the file's {self._size} bytes, "
                    f"found it at {chunk.byte_offset}",
                )
            offsets[row] = chunk.byte_offset
        return offsets

    def read(self, row: int, out: Sequence[Array], verify: bool = True) -> None:
        """Read the levels of one image into `out`; see ShardReader.read_into."""
        file = self._open_file()
        for number, target in enumerate(out):
            try:
                file.read_into(target.data.cast("B"), int(self._offsets[number, row]))
            except OSError as error:
                what = f"level {number} of image {self._key(row)!r}"
                raise damaged(self._path, f"{what} cannot be read: {error.strerror or error}", error) from error
            if verify:
                self.check(row, number, target)

    def check(self, row: int, number: int, level: Array) -> None:
        """Compare a level of an image with its checksum.

        Raises:
            CorruptGalleryError: it is not what was written.
        """
        if not is_whole(level, self._checksums[row, number]):
            raise damaged_level(self._path, self._key(row), number)


def share_out(work: Callable[[Sequence[T]], None], items: Sequence[T]) -> None:
    """Call work(some of the items) in several threads that are kept, until all items are done.

    Raises:
        Whatever the first failing share raises.
    """
    shares = [items[start::THREADS] for start in range(min(THREADS, len(items)))]
    if len(shares) < 2:
        for share in shares:
            work(share)
        return
    with _lock:
        pool = _pools.get(os.getpid()) or _pools.setdefault(
            os.getpid(), ThreadPoolExecutor(THREADS, thread_name_prefix="spade-faiss-read")
        )
    futures = [pool.submit(work, share) for share in shares]
    wait(futures)  # also after an error: no thread may go on writing into the caller's arrays
    for future in futures:
        future.result()
