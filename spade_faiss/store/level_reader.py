"""Reading a shard's levels without HDF5, whose library lets one thread in at a time and copies what it reads.

A level of an image is one chunk, not compressed: once HDF5 has said where in the file each chunk lies, the system reads
it straight into place, for any number of threads at once.
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
from ..errors import CorruptGalleryError
from ..system.forks import free_at_forks
from .file_pool import PooledFile
from .shard_format import damaged_level, is_whole

THREADS = 8  # that read: a disk is given so many things to do at a time, however few cores there are
SUPPORTED = hasattr(os, "preadv") and hasattr(h5py.h5d.DatasetID, "chunk_iter")  # elsewhere HDF5 reads: on Windows

T = TypeVar("T")

_lock = free_at_forks(threading.Lock())
_pools: dict[int, ThreadPoolExecutor] = {}  # by process, because a fork has none of its parent's threads


class LevelReader:
    """The levels of one shard: 16 bytes a level of each image. Threads may share one; it outlives its shard."""

    def __init__(
        self,
        path: Path,
        size: int,
        datasets: Sequence[Any],
        checksums: NDArray[np.uint64],
        key: Callable[[int], str],
        open_file: Callable[[], PooledFile],
    ) -> None:
        """Find out where everything lies; takes a millisecond for 1000 chunks.

        Args:
            path: of the shard.
            size: of the file, in bytes.
            datasets: of its levels, (n, c, h, w) each.
            checksums: of its levels, (n, L).
            key: of the image in a row, for errors.
            open_file: gives the file, to read from it.

        Raises:
            CorruptGalleryError: a level is not one chunk an image, as written, or lies outside the file.
        """
        self._path = path
        self._size = size
        self._key = key
        self._checksums = checksums
        self._open_file = open_file
        self._offsets = np.stack([self._find(number, dataset) for number, dataset in enumerate(datasets)])

    def _find(self, number: int, dataset: Any) -> NDArray[np.int64]:
        """Return the offset in the file of each image's chunk of a level, (n,)."""
        n, shape = len(dataset), dataset.shape[1:]
        expected = int(np.prod(shape)) * dataset.dtype.itemsize
        chunks: list[Any] = []
        if dataset.chunks == (1, *shape) and dataset.id.get_create_plist().get_nfilters() == 0:
            dataset.id.chunk_iter(chunks.append)
        chunks = [chunk for chunk in chunks if chunk.size == expected]
        rows = [chunk.chunk_offset[0] for chunk in chunks]
        if sorted(rows) != list(range(n)):
            raise CorruptGalleryError(
                f"{self._path}: level {number}: expected {n} chunks of {expected} bytes, not compressed, "
                f"found {len(rows)}"
            )
        offsets = np.empty(n, np.int64)
        for row, chunk in zip(rows, chunks, strict=True):
            if not 0 <= chunk.byte_offset <= self._size - expected:
                raise CorruptGalleryError(
                    f"{self._path}: level {number} of image {self._key(row)!r}: expected it within the file's "
                    f"{self._size} bytes, found it at {chunk.byte_offset}"
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
                raise CorruptGalleryError(f"{self._path}: {what} cannot be read: {error.strerror or error}") from error
            if verify and not is_whole(target, self._checksums[row, number]):
                raise damaged_level(self._path, self._key(row), number)


def share_out(work: Callable[[Sequence[T]], None], items: Sequence[T]) -> None:
    """Do work(some of the items), for all of them, in several threads that are kept; returns when all have ended.

    Raises:
        Whatever the first share raises that fails.
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
    wait(futures)  # also after an error: nobody may write on into arrays that the caller has back
    for future in futures:
        future.result()
