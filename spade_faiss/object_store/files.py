"""A gallery's files out of an object store: whole objects, and ranges of shards, each compared with its checksum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import CorruptGalleryError, GalleryNotFoundError, OptionError
from ..options import MIB
from ..store import level_reader
from ..store.file_pool import PooledFile
from ..store.files import GalleryFiles, Job
from ..store.level_reader import share_out
from ..store.snapshot import Snapshot
from ..system.forks import remember
from .address import Address
from .bucket import PUSH_AGAIN, Bucket
from .commit import FILE, Commit, StoredObject, rows_of
from .local_cache import CACHE_BYTES, LocalCache, default_folder
from .rows import RowsFile

TOGETHER = 64 * MIB  # of rows that are fetched at once
TRIES = 5  # to open a file of the cache that another process evicts at the same moment


def open_snapshot(address: Address, device: str, cache: str | Path | None, cache_bytes: int | None) -> Snapshot:
    """Open the last generation that was pushed.

    Args:
        address: of the gallery.
        device: of the image index.
        cache: folder on this machine; None: $SPADE_FAISS_CACHE, or the user's.
        cache_bytes: limit of what is kept there; None: 10 GiB.

    Raises:
        GalleryNotFoundError: there is no gallery at that address.
        CorruptGalleryError: its gallery.json is damaged, or has a format version that this release does not read.
        GalleryError: the store cannot be read, or the cache cannot be written.
        OptionError: the scheme is unknown, or its package is not installed.
    """
    if not level_reader.SUPPORTED:
        raise OptionError(f"{address}: expected Linux or macOS to read from an object store; pull the gallery first")
    bucket = Bucket(address)
    commit = read_commit(bucket)
    limit = CACHE_BYTES if cache_bytes is None else cache_bytes
    files = RemoteFiles(bucket, commit, LocalCache(Path(cache) if cache else default_folder(), limit))
    return Snapshot(address, commit.manifest.on(device), files=files)


def read_commit(bucket: Bucket) -> Commit:
    """Read what was pushed last; raises as open_snapshot."""
    content = bucket.read(FILE)
    if content is None:
        raise GalleryNotFoundError(f"{bucket.address}: expected a gallery, found no object {FILE}; push one there")
    return Commit.parse(content, bucket.address / FILE)


class RemoteFiles(GalleryFiles):
    """The files of one commit in an object store, through a cache. Threads may share one."""

    def __init__(self, bucket: Bucket, commit: Commit, cache: LocalCache) -> None:
        super().__init__(bucket.address)
        self.bucket = bucket
        self.commit = commit
        self.cache = cache
        self._good: dict[str, tuple[int, int]] = {}  # cached files that were compared: name to inode and size
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock."""
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Return the path of a whole file in the cache, fetched if it is not there.

        Raises:
            CorruptGalleryError: its object is missing, cut short or changed.
            GalleryError: the store cannot be read, or the cache cannot be written.
        """
        one = self.commit.objects.get(name)
        if one is None:
            return self.cache.folder / "none" / name  # no file is there
        with self._lock:  # another thread may be fetching it
            if not self._is_good(one):
                self._good.pop(one.local_name, None)
                self.cache.require(one.bytes, self.bucket.address / one.object)
                self.cache.put(one.local_name, one.bytes, compared(self.bucket, one))
                self._is_good(one)
            else:
                self.cache.touch(one.local_name)
            return self.cache.path(one.local_name)

    def identity(self, name: str, opened: Callable[[], PooledFile]) -> str:
        """See GalleryFiles. The checksum of its object: another folder may have pushed other content under the name."""
        return self.commit.objects[name].checksum

    def _is_good(self, one: StoredObject) -> bool:
        """Return whether the cache has a file with an object's content; a file is read once for that."""
        path = self.cache.path(one.local_name)
        try:
            status = path.stat()
            stamp = status.st_ino, status.st_size
            if self._good.get(one.local_name) == stamp:
                return True
            if status.st_size == one.bytes and checksum_of(path) == one.checksum:
                self._good[one.local_name] = stamp
                return True
        except OSError:  # not there, or not to be read
            return False
        self.cache.drop(one.local_name)
        return False

    def prefetch(self, paths: Iterable[Path]) -> None:
        """See GalleryFiles. What a later step would refuse is left to that step."""
        wanted = [self.commit.objects[rows_of(_name(path))] for path in paths]
        with self._lock:
            missing = [one for one in wanted if one.local_name not in self._good and not self._is_good(one)]
            if (
                len(missing) < 2 or 2 * sum(one.bytes for one in wanted) > self.cache.limit
            ):  # they would evict each other
                return
            for some in _together(missing):
                contents = self.bucket.ranges([(one.object, 0, one.bytes) for one in some])
                for one, content in zip(some, contents, strict=True):
                    if xxhash.xxh3_128_hexdigest(content) == one.checksum and self.cache.fits(one.bytes):
                        self.cache.put(one.local_name, one.bytes, [content])
                        self._is_good(one)

    def open_shard(self, path: Path, size: int) -> PooledFile:
        """See GalleryFiles."""
        for _ in range(TRIES):
            rows = self.path(rows_of(_name(path)))
            try:
                return RowsFile(rows, path, size)
            except CorruptGalleryError:
                if rows.exists():
                    raise
        raise CorruptGalleryError(
            f"{path}: expected its rows in {self.cache.folder}, found that other processes evict them at once; "
            "raise the limit (cache_bytes=SIZE)"
        )

    def for_hdf5(self, path: Path, size: int) -> Any:
        """See GalleryFiles."""
        return self.open_shard(path, size).for_hdf5()

    def read_levels(self, jobs: Sequence[Job], verify: bool) -> None:
        """See GalleryFiles. Levels are compared with their checksums, whatever `verify` says."""
        missing: list[Job] = []
        share_out(lambda share: missing.extend(job for job in share if not self._load(job)), jobs)
        wanted = [
            (self.commit.objects[_name(reader.path)].object, offset, size)
            for reader, row, _ in missing
            for offset, size in reader.extents(row)
        ]
        found = iter(self.bucket.ranges(wanted) if wanted else ())
        for reader, row, out in missing:
            parts = [next(found) for _ in out]
            for number, (level, part) in enumerate(zip(out, parts, strict=True)):
                _fill(level, part)
                reader.check(row, number, level)
            if self.cache.fits(size := sum(map(len, parts))):
                self.cache.put(self._levels_name(reader.path, row), size, parts)

    def _load(self, job: Job) -> bool:
        """Take levels from the cache; returns whether they are there, and what was written."""
        reader, row, out = job
        name = self._levels_name(reader.path, row)
        content = self.cache.load(name)
        if content is None:
            return False
        sizes = [size for _, size in reader.extents(row)]
        if len(content) == sum(sizes):
            start, view = 0, memoryview(content)
            for level, size in zip(out, sizes, strict=True):
                _fill(level, view[start : start + size])
                start += size
            try:
                for number, level in enumerate(out):
                    reader.check(row, number, level)
                return True
            except CorruptGalleryError:
                pass
        self.cache.drop(name)
        return False

    def _levels_name(self, shard: Path, row: int) -> str:
        return f"{self.commit.objects[_name(shard)].checksum}-{row}.levels"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Read every object and compare it with its checksum; yields (file, what is wrong with it)."""
        for file, one in self.commit.objects.items():
            try:
                for _ in compared(self.bucket, one):
                    pass
            except CorruptGalleryError as error:
                yield file, str(error)


def _together(objects: Sequence[StoredObject]) -> Iterator[list[StoredObject]]:
    """Split objects into groups that fit into memory."""
    some: list[StoredObject] = []
    for one in objects:
        if some and sum(other.bytes for other in some) + one.bytes > TOGETHER:
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def checksum_of(path: Path) -> str:
    """Return the xxh3-128 of a file, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def compared(bucket: Bucket, one: StoredObject) -> Iterator[bytes]:
    """Read an object in blocks, and compare it with its checksum at the end.

    Raises:
        CorruptGalleryError: it is missing, cut short or changed.
        GalleryError: the store cannot be read.
    """
    digest = xxhash.xxh3_128()
    for block in bucket.stream(one.object, one.bytes):
        digest.update(block)
        yield block
    if (found := digest.hexdigest()) != one.checksum:
        raise CorruptGalleryError(
            f"{bucket.address / one.object}: expected xxh3-128 {one.checksum}, found {found}: it has changed; "
            f"{PUSH_AGAIN}"
        )


def _name(path: Path) -> str:
    """Return a file's name in the manifest, as shards/000000.h5."""
    return "/".join(path.parts[-2:])


def _fill(level: Any, content: bytes | memoryview) -> None:
    level.reshape(-1).view(np.uint8)[:] = np.frombuffer(content, np.uint8)
