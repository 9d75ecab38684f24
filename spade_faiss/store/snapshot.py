"""One generation of a gallery, read only: all its shards as one long table, and the index over it.

Ids count the rows of all shards in the manifest's order. A generation never changes, so threads may share it.
"""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from ..errors import CorruptGalleryError, FeatureError, OptionError
from ..index.image_index import ImageIndex
from ..options import IndexOptions
from ..system.forks import remember
from ..system.prefetch import batched
from . import level_reader as chunks
from .file_pool import FilePool
from .key_table import KeyTable
from .locks import ReaderLock
from .manifest import Manifest
from .row_reader import RowReader
from .shard_reader import ShardReader

OPEN_SHARDS = 32  # held open in HDF5, for whoever reads a shard as a whole
KNOWN_SHARDS = 1024  # of which it is kept where the levels are: 0.1 MB each at their usual size
TEXTS_TOGETHER = 10_000  # keys or digests in memory at a time, for those who look at all of them
READ_TOGETHER = 64  # images whose levels are read at a time


class Snapshot:
    """What a gallery holds at one commit. While it is in use, a reader's lock keeps its files from being deleted."""

    def __init__(self, folder: Path, manifest: Manifest, lock: ReaderLock | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._starts = [0, *accumulate(shard.images for shard in manifest.shards)]
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._files = FilePool()
        self._readers: OrderedDict[int, chunks.LevelReader] = OrderedDict()
        self._lock = threading.RLock()
        self._index: ImageIndex | None = None
        self._key_table: KeyTable | None = None
        self._reader_lock = lock
        remember(self)

    def after_fork(self) -> None:
        """Be of use in a forked process: with a lock that nobody holds, and files of its own."""
        self._lock = threading.RLock()
        self._open = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.rows - self.manifest.removed

    @cached_property
    def removed(self) -> Ids:
        """Ids of removed images, ascending."""
        return np.flatnonzero(self.removed_mask)

    @cached_property
    def removed_mask(self) -> NDArray[np.bool_]:
        """For each id whether that image was removed, (rows,)."""
        mask = np.zeros(self.manifest.rows, np.bool_)
        for start, shard in zip(self._starts, self.manifest.shards, strict=False):
            if shard.removed:
                mask[start : start + shard.images] = shard.removed_mask
        return mask

    def ids(self) -> Ids:
        """Return the ids of all images but the removed ones, ascending."""
        return np.flatnonzero(~self.removed_mask)

    def find(self, key: str) -> int | None:
        """Return the id of a key; None where there is no such image."""
        return self.find_all([key])[0]

    def find_all(self, keys: Sequence[str]) -> list[int | None]:
        """Return for each of n keys its id, or None; opens only the shards that these keys are in."""
        found: list[int | None] = [None] * len(keys)
        candidates = [
            (at, row_id)
            for at, row_ids in enumerate(self.key_table().candidates(keys))
            for row_id in row_ids
            if not self._is_removed(row_id)
        ]
        for (at, row_id), key in zip(candidates, self.keys([row_id for _, row_id in candidates]), strict=True):
            if key == keys[at]:  # else another key has the same hash
                found[at] = row_id
        return found

    def shown(self, row_id: int) -> str:
        """Return the key of an image for people, whatever has become of it."""
        return self.rows.names(row_id).shown(0)

    def shard_number(self, row_id: int) -> int:
        """Return which of the shards an image is in."""
        return self._locate(row_id)[0]

    def _is_removed(self, row_id: int) -> bool:
        number, row = self._locate(row_id)
        return self.manifest.shards[number].is_removed(row)

    def followed_by(self, manifest: Manifest, added: Collection[str]) -> Snapshot:
        """Return the generation that a commit makes of this one; `added` are the keys of the new rows, in order."""
        following = Snapshot(self.folder, manifest)
        ours, theirs = ([shard.file for shard in one.shards] for one in (self.manifest, manifest))
        grown = theirs[: len(ours)] == ours and manifest.rows == self.manifest.rows + len(added)  # else ids are others
        if self._key_table is not None and grown:
            # Looking up keys must not cost a pass over all shards at every commit.
            following._key_table = self._key_table.extended(key.encode() for key in added)
        return following

    def key_table(self) -> KeyTable:
        """Return the ids of every row by its key: from its file as far as that goes, the rest from the shards."""
        with self._lock:
            if self._key_table is None:
                self._key_table = self.build_key_table(self._filed_key_table())
            return self._key_table

    def build_key_table(self, filed: KeyTable | None = None) -> KeyTable:
        """Build the key table from the shards, but for the rows that a file has of it."""
        table = filed or KeyTable()
        return table.extended(
            key
            for number, first in enumerate(self._starts[:-1])
            if self._starts[number + 1] > len(table)
            for key in self._stored_keys(number, max(0, len(table) - first))
        )

    def _stored_keys(self, number: int, start: int) -> list[bytes]:
        """Return the keys of a shard's rows from `start` on, in UTF-8: of removed ones whatever is there."""
        kept = ~self.manifest.shards[number].removed_mask[start:]
        names = self.rows.names(self._starts[number] + start, len(kept))
        for row in np.flatnonzero(kept).tolist():
            names.check(row)
        stored: list[bytes] = names.column(0).stored.tolist()
        return stored

    def _filed_key_table(self) -> KeyTable | None:
        if self.manifest.keys is None:
            return None
        try:
            return self.load_key_file()
        except CorruptGalleryError as error:
            warnings.warn(f"key table is rebuilt from the shards: {error}", stacklevel=2)
            return None

    def load_key_file(self) -> KeyTable:
        """Read the file of the key table, which may cover fewer rows than there are.

        Raises:
            CorruptGalleryError: it is missing or does not match.
        """
        entry = self.manifest.keys
        assert entry is not None
        return KeyTable.load(self.folder / entry.file, entry.images, entry.bytes, entry.xxh3)

    def shard(self, number: int) -> ShardReader:
        """Open a shard, or return it where it is open."""
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                entry = self.manifest.shards[number]
                path, manifest = self.folder / entry.file, self.manifest
                shard = ShardReader(path, manifest.spec, entry.images, entry.bytes, manifest.patches)
                self._open[number] = shard
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(number)
            return shard

    def keys(self, ids: Sequence[int] | Ids) -> list[str]:
        """Return the keys of images."""
        return self.rows.texts(self._checked(ids), "keys")

    def digests(self, ids: Sequence[int] | Ids) -> list[str]:
        """Return the content digests of images."""
        return self.rows.texts(self._checked(ids), "digests")

    def source(self, row_id: int) -> str | None:
        """Return the path of the image file that patches are recomputed from; None where they are stored."""
        if self.manifest.patches == "stored":
            return None
        [path] = self.rows.texts(self._checked([row_id]), "sources")
        return path

    def levels(self, ids: Sequence[int] | Ids) -> list[Array]:
        """Read the pyramid levels of images, in that order: [(len(ids), c, h, w), ...].

        Raises:
            OptionError: they are not stored, but recomputed from image files.
        """
        if self.manifest.patches == "recompute":
            raise OptionError(
                f"{self.folder}: it recomputes patches from image files, which takes the extractor: "
                "use a Detector, or Gallery.read(ids, extractor)"
            )
        spec = self.manifest.spec
        out = [np.empty((len(ids), *shape), spec.dtype) for shape in spec.level_shapes]
        self.read_into(ids, [[level[position] for level in out] for position in range(len(ids))])
        return out

    def read_into(self, ids: Sequence[int] | Ids, out: Sequence[list[Array]], verify: bool = True) -> None:
        """Read the levels of n images into `out`, for each image [(c, h, w), ...]; see ShardReader.read_into."""
        places = [self._locate(row_id) for row_id in ids]
        for some in batched(sorted(range(len(places)), key=places.__getitem__), READ_TOGETHER):  # in the order on disk
            if chunks.SUPPORTED:
                readers = {number: self._reader(number) for number in {places[at][0] for at in some}}
                jobs = [(readers[places[at][0]], places[at][1], out[at]) for at in some]
                chunks.share_out(lambda share: _read(share, verify), jobs)  # not under the lock
            else:
                with self._lock:
                    for at in some:
                        self.shard(places[at][0]).read_into(places[at][1], out[at], verify)

    def _reader(self, number: int) -> chunks.LevelReader:
        """Return what reads the levels of a shard. It is kept: to find out where they are takes as long as reading."""
        with self._lock:
            reader = self._readers.get(number)
            if reader is None:
                shard, entry = self.shard(number), self.manifest.shards[number]
                first, rows, files = self._starts[number], self.rows, self._files  # not self: it would never be freed
                reader = shard.reader(
                    lambda row: rows.names(first + row).shown(0),
                    lambda: files.open(number, shard.path, entry.bytes),
                )
                self._readers[number] = reader
                if len(self._readers) > KNOWN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return reader

    def identity(self, row_id: int) -> tuple[str, int]:
        """Return what names an image in every generation: the file of its shard, and the row in it."""
        number, row = self._locate(row_id)
        return self.manifest.shards[number].file, row

    def image_feature(self, row_id: int) -> Array:
        """Read the image feature of one image, (d,) float32."""
        feature: Array = self.rows.read(self._checked([row_id]))[0]
        return feature

    def search(
        self, image_features: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[Ids, Array]:
        """Find the k nearest images; see Gallery.search."""
        d = self.manifest.spec.image_dim
        queries = np.asarray(image_features)
        if queries.ndim != 2 or queries.shape[1] != d or queries.dtype.kind != "f":
            raise FeatureError(f"image features: expected (m, {d}) floats, found {queries.shape} {queries.dtype}")
        if not np.isfinite(queries).all():
            raise FeatureError("image features: expected finite values, found NaN or infinity")
        return self.index().search(queries, k, without, nprobe, self.removed_mask if self.manifest.removed else None)

    @cached_property
    def rows(self) -> RowReader:
        """Image features and names of all rows, removed ones included."""
        manifest = self.manifest
        return RowReader(self.folder, manifest.shards, manifest.spec.image_dim, manifest.patches, self._files)

    def _checked(self, ids: Sequence[int] | Ids) -> Ids:
        checked = np.asarray(ids, np.int64)
        for row_id in checked[(checked < 0) | (checked >= self._starts[-1])]:
            self._locate(row_id)
        return checked

    def _locate(self, row_id: int) -> tuple[int, int]:
        if not 0 <= row_id < self._starts[-1]:
            raise OptionError(f"ids: expected 0 to {self._starts[-1] - 1}, found {row_id}")
        number = bisect_right(self._starts, row_id) - 1
        return number, int(row_id) - self._starts[number]

    def index(self) -> ImageIndex:
        """Return the index over every row: from its file as far as that goes, the rest from the shards."""
        with self._lock:
            if self._index is None:
                self._index = self._load_index() or self.build_index()
            return self._index

    def build_index(self, options: IndexOptions | None = None) -> ImageIndex:
        """Build the index from the shards: a flat one while there are too few images for the kind asked for.

        Args:
            options: of the index; None: the gallery's.
        """
        options = options or self.manifest.index_options
        d = self.manifest.spec.image_dim
        try:
            return ImageIndex.build(self.rows, d, options)
        except OptionError as error:
            warnings.warn(f"image index is flat until there are more images: {error}", stacklevel=2)
            index = ImageIndex.build(self.rows, d, replace(options, kind="flat"))
            index.stands_in = True
            return index

    def _load_index(self) -> ImageIndex | None:
        if self.manifest.index is None:
            return None
        try:
            return self.load_index_file()
        except CorruptGalleryError as error:
            warnings.warn(f"image index is rebuilt from the shards: {error}", stacklevel=2)
            return None

    def load_index_file(self, grows: bool = False) -> ImageIndex:
        """Read the file of the index, and fill in the rows that it does not cover from the shards.

        Args:
            grows: so that it can be saved again; see ImageIndex.load.

        Raises:
            CorruptGalleryError: it is missing or does not match.
        """
        entry, manifest = self.manifest.index, self.manifest
        assert entry is not None
        path, d = self.folder / entry.file, manifest.spec.image_dim
        if path.is_file() and (found := path.stat().st_size) != entry.bytes:
            raise CorruptGalleryError(f"{path}: expected {entry.bytes} bytes, found {found}")
        index = ImageIndex.load(path, entry.xxh3, d, manifest.index_options, entry.facts, self.rows, grows)
        if len(index) != entry.images:
            raise CorruptGalleryError(f"{entry.file}: expected {entry.images} images, found {len(index)}")
        for block in self.rows.blocks(entry.images):
            index.add(block)
        return index

    def has_derived_files(self) -> bool:
        """Tell whether the files of index and key table are there and good."""
        if self.manifest.index is None or self.manifest.keys is None:
            return False
        try:
            self.load_index_file()
            self.load_key_file()
        except CorruptGalleryError:
            return False
        return True

    def hold(self, lock: ReaderLock) -> None:
        """Keep the files from being deleted."""
        self._reader_lock = lock

    def release(self) -> None:
        """Let the files be deleted once they are those of an older generation."""
        if self._reader_lock is not None:
            self._reader_lock.close()

    def close(self) -> None:
        """Close the files."""
        self.release()
        self._files.close()
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()


def _read(jobs: Sequence[tuple[chunks.LevelReader, int, list[Array]]], verify: bool) -> None:
    for reader, row, out in jobs:
        reader.read(row, out, verify)
