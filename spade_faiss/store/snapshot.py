"""A gallery at one commit, read only: all its shards as one long table.

Ids count the rows of all shards in the manifest's order. A snapshot never changes, so threads may share it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from ..errors import FeatureError, OptionError
from ..images.keys import other_forms
from ..images.tiling import image_key
from ..options import is_count, plain
from ..system.forks import remember
from ..system.prefetch import batched
from . import level_reader
from .file_pool import FilePool
from .files import GalleryFiles
from .index_reader import IndexReader
from .level_reader import LevelReader
from .locks import ReaderLock
from .manifest import Manifest, ShardEntry
from .row_reader import RowReader
from .shard_reader import ShardReader
from .tiles import TileTable

OPEN_SHARDS = 32  # kept open in HDF5, for callers that read whole shards
KNOWN_SHARDS = 1024  # whose LevelReaders are kept: 0.1 MB each for shards of the usual size
TEXTS_TOGETHER = 10_000  # keys or digests in memory at a time, for callers that go through all of them
READ_TOGETHER = 64  # images whose levels are read at a time


class Snapshot:
    """A gallery's content at one commit. Its reader's lock keeps writers from deleting its files."""

    def __init__(
        self, folder: Path, manifest: Manifest, lock: ReaderLock | None = None, files: GalleryFiles | None = None
    ) -> None:
        """Look at one commit.

        Args:
            folder: of the gallery; or its address, if `files` are elsewhere.
            manifest: of the commit.
            lock: keeps the files.
            files: where they are; None: in the folder.
        """
        self.folder = folder
        self.files = files or GalleryFiles(folder)
        self.manifest = manifest
        self._starts = [0, *accumulate(shard.images for shard in manifest.shards)]
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._files = FilePool(self.files.open_shard, self.files.prefetch if files else None)
        self.rows = RowReader(folder, manifest.shards, manifest.schema, self._files)
        self.indexes = IndexReader(self.files, manifest, self.rows)
        self._readers: OrderedDict[int, LevelReader] = OrderedDict()
        self._identities: dict[int, str] = {}  # of shards, by number
        self._lock = threading.RLock()
        self._reader_lock = lock
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock, and the files that are open in HDF5."""
        self._lock = threading.RLock()
        self._open = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.rows - self.manifest.removed

    def __repr__(self) -> str:
        return f"Snapshot({str(self.folder)!r}, generation {self.manifest.generation}, {len(self)} images)"

    @cached_property
    def removed_mask(self) -> NDArray[np.bool_]:
        """Whether the image of each id was removed, (rows,)."""
        mask = np.zeros(self.manifest.rows, np.bool_)
        for start, shard in zip(self._starts, self.manifest.shards, strict=False):
            if shard.removed:
                mask[start : start + shard.images] = shard.removed_mask
        return mask

    def ids(self) -> Ids:
        """Return the ids of all images, without the removed ones, ascending."""
        return np.flatnonzero(~self.removed_mask)

    @cached_property
    def tiles(self) -> TileTable | None:
        """Which rows are tiles of one image, by a pass over all keys; None: each row is an image."""
        if self.manifest.spec.tile is None:
            return None
        ids = self.ids()
        keys = (key for rows in batched(ids.tolist(), TEXTS_TOGETHER) for key in self.keys(rows))
        return TileTable(ids, keys)

    def image_keys(self, ids: Sequence[int] | Ids) -> list[str]:
        """Return the keys of the images that some rows are, or are tiles of."""
        keys = self.keys(ids)
        return keys if self.manifest.spec.tile is None else [image_key(key) for key in keys]

    def find(self, key: str) -> int | None:
        """Return the id of a key; None: not in the gallery."""
        return self.find_all([key])[0]

    def find_all(self, keys: Sequence[str]) -> list[int | None]:
        """Return the ids of n keys; None: not in the gallery. Opens only the shards that these keys are in.

        A key that is not there is looked for in other forms of Unicode normalisation: file systems change the form.
        """
        found = self.find_exactly(keys)
        others = [
            (at, form)
            for at, key in enumerate(keys)
            if found[at] is None and isinstance(key, str)
            for form in other_forms(key)
        ]
        if others:
            for (at, _), row_id in zip(others, self.find_exactly([form for _, form in others]), strict=True):
                if found[at] is None:
                    found[at] = row_id
        return found

    def find_exactly(self, keys: Sequence[str]) -> list[int | None]:
        """Return the ids of n keys in just these forms; None: not in the gallery."""
        found: list[int | None] = [None] * len(keys)
        candidates = [
            (at, row_id)
            for at, row_ids in enumerate(self.indexes.key_table().candidates(keys))
            for row_id in row_ids
            if not self._is_removed(row_id)
        ]
        for (at, row_id), key in zip(candidates, self.keys([row_id for _, row_id in candidates]), strict=True):
            if key == keys[at]:  # else another key has the same hash
                found[at] = row_id
        return found

    def shown(self, row_id: int) -> str:
        """Return the key of an image to show in messages, even if it is damaged."""
        return self.rows.names(row_id).shown(0)

    def shard_number(self, row_id: int) -> int:
        """Return the number of the shard that an image is in."""
        return self._locate(row_id)[0]

    def _is_removed(self, row_id: int) -> bool:
        number, row = self._locate(row_id)
        return self.manifest.shards[number].is_removed(row)

    def followed_by(self, manifest: Manifest, added: Collection[str]) -> Snapshot:
        """Return the snapshot after a commit; `added` are the keys of its new rows, in order."""
        following = Snapshot(self.folder, manifest)
        following.indexes.continue_key_table(self.indexes, added)
        return following

    def shard(self, number: int) -> ShardReader:
        """Return the open reader of a shard; open it first if it is closed."""
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                entry = self.manifest.shards[number]
                path, schema = self.folder / entry.file, self.manifest.schema
                opened = self.files.for_hdf5(path, entry.bytes)
                shard = ShardReader(path, schema, entry.images, entry.bytes, opened)
                self._open[number] = shard
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)  # it closes when whoever reads from it has finished
            self._open.move_to_end(number)
            return shard

    def keys(self, ids: Sequence[int] | Ids) -> list[str]:
        """Return the keys of images."""
        return self.rows.texts(self._checked(ids), "keys")

    def digests(self, ids: Sequence[int] | Ids) -> list[str]:
        """Return the content digests of images."""
        return self.rows.texts(self._checked(ids), "digests")

    def source(self, row_id: int) -> str | None:
        """Return the path of an image's file; None: the gallery stores levels, and keeps no paths."""
        if self.manifest.schema.has_levels:
            return None
        [path] = self.rows.texts(self._checked([row_id]), "sources")
        return path

    def levels(self, ids: Sequence[int] | Ids) -> list[Array]:
        """Read the pyramid levels of images, in that order: [(len(ids), c, h, w), ...].

        Raises:
            OptionError: the gallery does not store levels, but recomputes them from image files.
        """
        if not self.manifest.schema.has_levels:
            raise OptionError(
                f"{self.folder}: it recomputes patches from image files, which takes the extractor: "
                "use a Detector, or Gallery.read(ids, extractor)"
            )
        spec = self.manifest.spec
        out = [np.empty((len(ids), *shape), spec.dtype) for shape in spec.level_shapes]
        self.read_into(ids, [[level[position] for level in out] for position in range(len(ids))])
        return out

    def read_into(self, ids: Sequence[int] | Ids, out: Sequence[list[Array]], verify: bool = True) -> None:
        """Read the levels of n images into `out`: [(c, h, w), ...] for each image; see ShardReader.read_into."""
        places = [self._locate(row_id) for row_id in ids]
        for some in batched(sorted(range(len(places)), key=places.__getitem__), READ_TOGETHER):  # in the order on disk
            if level_reader.SUPPORTED:
                readers = {number: self._reader(number) for number in {places[at][0] for at in some}}
                jobs = [(readers[places[at][0]], places[at][1], out[at]) for at in some]
                self.files.read_levels(jobs, verify)  # not under the lock
            else:
                with self._lock:
                    for at in some:
                        self.shard(places[at][0]).read_into(places[at][1], out[at], verify)

    def _reader(self, number: int) -> LevelReader:
        """Return the LevelReader of a shard. It is kept: asking where levels lie takes as long as reading them."""
        with self._lock:
            reader = self._readers.get(number)
            if reader is None:
                shard, entry = self.shard(number), self.manifest.shards[number]
                first, rows, files, path = self._starts[number], self.rows, self._files, shard.path
                reader = shard.reader(  # a reference to self would be a cycle, one to the shard would keep it open
                    lambda row: rows.names(first + row).shown(0), lambda: files.open(number, path, entry.bytes)
                )
                self._readers[number] = reader
                if len(self._readers) > KNOWN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return reader

    def identity(self, row_id: int) -> tuple[str, int]:
        """Return what identifies an image in every snapshot: its shard, as GalleryFiles names it, and the row in it.

        Raises:
            CorruptGalleryError: the shard cannot be opened.
        """
        number, row = self._locate(row_id)
        if (name := self._identities.get(number)) is None:
            entry = self.manifest.shards[number]
            path = self.folder / entry.file
            name = self.files.identity(entry.file, lambda: self._files.open(number, path, entry.bytes))
            name = self._identities.setdefault(number, name)
        return name, row

    def shards_without(self, ids: Iterable[int]) -> list[ShardEntry]:
        """Return the manifest's shards with these ids removed as well."""
        rows: dict[int, list[int]] = {}
        for number, row in map(self._locate, ids):
            rows.setdefault(number, []).append(row)
        shards = self.manifest.shards
        return [shard.without(rows[number]) if number in rows else shard for number, shard in enumerate(shards)]

    def image_feature(self, row_id: int) -> Array:
        """Read the image feature of one image, (d,) float32."""
        feature: Array = self.rows.read(self._checked([row_id]))[0]
        return feature

    def search(
        self, image_features: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[Ids, Array]:
        """Find the k nearest images; see Gallery.search."""
        queries, k = self._as_search(image_features, k)
        return self.indexes.image_index().search(
            queries, k, without, nprobe, self.removed_mask if self.manifest.removed else None
        )

    def _as_search(self, image_features: Array, k: int) -> tuple[Array, int]:
        """Return queries in float32, and the number of their neighbours as Python's.

        Raises:
            FeatureError: another shape, or values that are not finite.
            OptionError: k is no number of images.
        """
        d, k = self.manifest.spec.image_dim, plain(k)
        queries = np.asarray(image_features)
        if queries.ndim != 2 or queries.shape[1] != d or queries.dtype.kind != "f":
            raise FeatureError(f"image features: expected (m, {d}) floats, found {queries.shape} {queries.dtype}")
        with np.errstate(over="ignore"):
            queries = queries.astype(np.float32, copy=False)
        if not np.isfinite(queries).all():
            raise FeatureError("image features: expected finite values in float32, found NaN or infinity")
        if not is_count(k):
            raise OptionError(f"k: expected a number >= 1, found {k!r}")
        return queries, k

    def present(self, ids: Sequence[int] | Ids) -> Ids:
        """Return ids that a user gives as an array.

        Raises:
            OptionError: one that is not in the gallery, or was removed.
        """
        checked = self._checked(ids)
        if gone := checked[self.removed_mask[checked]].tolist() if self.manifest.removed else []:
            raise OptionError(f"ids: expected those of images in {self.folder}, found {gone[0]}, which was removed")
        return checked

    def _checked(self, ids: Sequence[int] | Ids) -> Ids:
        given = np.asarray(ids)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise OptionError(f"ids: expected whole numbers, found {ids!r}"[:200])
        checked = given.astype(np.int64, copy=False)
        for row_id in checked[(checked < 0) | (checked >= self._starts[-1])]:
            self._locate(row_id)
        return checked

    def _locate(self, row_id: int) -> tuple[int, int]:
        if not 0 <= row_id < self._starts[-1]:
            raise OptionError(f"ids: expected 0 to {self._starts[-1] - 1}, found {row_id}")
        number = bisect_right(self._starts, row_id) - 1
        return number, int(row_id) - self._starts[number]

    def hold(self, lock: ReaderLock) -> None:
        """Keep writers from deleting the files."""
        self._reader_lock = lock

    def release(self) -> None:
        """Let writers delete the files once the last commit does not name them."""
        if self._reader_lock is not None:
            self._reader_lock.close()

    def close(self) -> None:
        """Close the files."""
        self.release()
        self._files.close()
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()
