"""One generation of a gallery, read only: all its shards as one long table, and the index over it.

Ids count the rows of all shards in the manifest's order. A generation never changes, so threads may share it.
"""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import chunks
from .errors import CorruptGalleryError, FeatureError, OptionError
from .features import Array
from .image_index import Ids, ImageIndex
from .images import batched
from .locks import ReaderLock
from .manifest import Manifest
from .shards import Shard

OPEN_SHARDS = 128  # files held open: a process may have 1024 by default
READ_TOGETHER = 64  # images that are read at a time; less than the above, so that their shards can all be open


class Generation:
    """What a gallery holds at one commit. While it is in use, a reader's lock keeps its files from being deleted."""

    def __init__(self, folder: Path, manifest: Manifest, lock: ReaderLock | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._starts = [0, *accumulate(shard.images for shard in manifest.shards)]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.RLock()
        self._index: ImageIndex | None = None
        self._reader_lock = lock

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

    @cached_property
    def id_of(self) -> dict[str, int]:
        """The id of each key."""
        removed = set(self.removed.tolist())
        keys = (key for number in range(len(self.manifest.shards)) for key in self.shard(number).keys)
        return {key: row for row, key in enumerate(keys) if row not in removed}

    def followed_by(self, manifest: Manifest, removed: set[int], added: Mapping[str, str]) -> Generation:
        """Return the generation that a commit makes of this one; `added` are the keys of its last shard, in order."""
        following = Generation(self.folder, manifest)
        if "id_of" in self.__dict__ and manifest.rows == self.manifest.rows + len(added):
            # Looking up keys must not cost a pass over all shards at every commit.
            known = {key: row for key, row in self.id_of.items() if row not in removed} if removed else self.id_of
            known.update(zip(added, range(self.manifest.rows, manifest.rows), strict=True))
            following.__dict__["id_of"] = known
        return following

    def shard(self, number: int) -> Shard:
        """Open a shard, or return it where it is open."""
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                entry = self.manifest.shards[number]
                path, manifest = self.folder / entry.file, self.manifest
                shard = Shard(path, manifest.spec, entry.images, entry.bytes, manifest.patches)
                self._open[number] = shard
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(number)
            return shard

    def keys(self, ids: Sequence[int] | Ids) -> list[str]:
        """Return the keys of images."""
        with self._lock:
            return [self.shard(number).keys[row] for number, row in map(self._locate, ids)]

    def digests(self, ids: Sequence[int] | Ids) -> list[str]:
        """Return the content digests of images."""
        with self._lock:
            return [self.shard(number).digests[row] for number, row in map(self._locate, ids)]

    def source(self, row_id: int) -> str | None:
        """Return the path of the image file that patches are recomputed from; None where they are stored."""
        if self.manifest.patches == "stored":
            return None
        number, row = self._locate(row_id)
        with self._lock:
            sources = self.shard(number).sources
        assert sources is not None
        return sources[row]

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
        """Read the pyramid levels of n images into `out`, for each image [(c, h, w), ...]; see Shard.read_into."""
        places = [self._locate(row_id) for row_id in ids]
        for some in batched(sorted(range(len(places)), key=places.__getitem__), READ_TOGETHER):  # in the order on disk
            if chunks.SUPPORTED:
                with self._lock:
                    readers = {number: self.shard(number).reader() for number in {places[at][0] for at in some}}
                jobs = [(readers[places[at][0]], places[at][1], out[at]) for at in some]
                chunks.share_out(lambda share: _read(share, verify), jobs)  # not under the lock
            else:
                with self._lock:
                    for at in some:
                        self.shard(places[at][0]).read_into(places[at][1], out[at], verify)

    def identity(self, row_id: int) -> tuple[str, int]:
        """Return what names an image in every generation: the file of its shard, and the row in it."""
        number, row = self._locate(row_id)
        return self.manifest.shards[number].file, row

    def image_feature(self, row_id: int) -> Array:
        """Read the image feature of one image, (d,) float32."""
        number, row = self._locate(row_id)
        with self._lock:
            return self.shard(number).image_feature(row)

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
        left_out = self.removed if without is None else np.union1d(self.removed, without)
        return self.index().search(queries, k, left_out, nprobe)

    def image_features(self, start: int = 0) -> Iterator[Array]:
        """Read the image features of ids from `start` on, removed ones included, a shard at a time."""
        for number, (first, entry) in enumerate(zip(self._starts, self.manifest.shards, strict=False)):
            if first + entry.images > start:
                with self._lock:
                    block = self.shard(number).image_features()
                yield block[max(0, start - first) :]

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

    def build_index(self) -> ImageIndex:
        """Build the index from the shards: a flat one while there are too few images for the kind asked for."""
        rows, d, options = self.manifest.rows, self.manifest.spec.image_dim, self.manifest.index_options
        try:
            return ImageIndex.build(self.image_features, rows, d, options)
        except OptionError as error:
            warnings.warn(f"image index is flat until there are more images: {error}", stacklevel=2)
            return ImageIndex.build(self.image_features, rows, d, replace(options, kind="flat"), stands_in=True)

    def _load_index(self) -> ImageIndex | None:
        entry = self.manifest.index
        if entry is None:
            return None
        try:
            index = self.load_index_file()
        except CorruptGalleryError as error:
            warnings.warn(f"image index is rebuilt from the shards: {error}", stacklevel=2)
            return None
        for block in self.image_features(start=len(index)):
            index.add(block)
        return index

    def load_index_file(self) -> ImageIndex:
        """Read the file of the index, which may cover fewer rows than there are.

        Raises:
            CorruptGalleryError: it is missing or does not match.
        """
        entry, manifest = self.manifest.index, self.manifest
        assert entry is not None
        index = ImageIndex.load(self.folder / entry.file, entry.xxh3, manifest.spec.image_dim, manifest.index_options)
        if len(index) != entry.images:
            raise CorruptGalleryError(f"{entry.file}: expected {entry.images} images, found {len(index)}")
        return index

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
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()


def _read(jobs: Sequence[tuple[chunks.LevelReader, int, list[Array]]], verify: bool) -> None:
    for reader, row, out in jobs:
        reader.read(row, out, verify)
