"""Reads a gallery's secondary indexes, image index and key table: from their files, with newer rows from the shards."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection
from dataclasses import replace
from itertools import accumulate

import numpy as np

from ..errors import CorruptGalleryError, OptionError
from ..index.image_index import ImageIndex, IndexFile
from ..options import IndexOptions
from ..system.forks import remember
from .files import GalleryFiles
from .key_table import KeyTable
from .manifest import Manifest
from .row_reader import RowReader


class IndexReader:
    """The image index and the key table over every row of one snapshot, loaded on first use. Threads may share one."""

    def __init__(self, files: GalleryFiles, manifest: Manifest, rows: RowReader) -> None:
        self._files = files
        self._manifest = manifest
        self._rows = rows
        self._starts = [0, *accumulate(shard.images for shard in manifest.shards)]
        self._image_index: ImageIndex | None = None
        self._key_table: KeyTable | None = None
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock."""
        self._lock = threading.Lock()

    def image_index(self) -> ImageIndex:
        """Return the index over every row: from its file, with the rows that it does not cover from the shards."""
        with self._lock:
            if self._image_index is None:
                self._image_index = self._filed_image_index() or self.build_image_index()
            return self._image_index

    def build_image_index(self, options: IndexOptions | None = None) -> ImageIndex:
        """Build the index from the shards; a flat one if there are too few images for the kind asked for.

        Args:
            options: of the index; None: the gallery's.
        """
        options = options or self._manifest.index_options
        d = self._manifest.spec.image_dim
        try:
            return ImageIndex.build(self._rows, d, options)
        except OptionError as error:
            warnings.warn(f"image index is flat until there are more images: {error}", stacklevel=2)
            index = ImageIndex.build(self._rows, d, replace(options, kind="flat"))
            index.stands_in = True
            return index

    def _filed_image_index(self) -> ImageIndex | None:
        if self._manifest.index is None:
            return None
        try:
            return self.load_image_index()
        except CorruptGalleryError as error:
            warnings.warn(f"image index is rebuilt from the shards: {error}", stacklevel=2)
            return None

    def load_image_index(self, grows: bool = False) -> ImageIndex:
        """Read the index's file, and add the rows that it does not cover from the shards.

        Args:
            grows: so that it can be saved again; see ImageIndex.load.

        Raises:
            CorruptGalleryError: the file is missing, or not what was written.
        """
        entry, manifest = self._manifest.index, self._manifest
        assert entry is not None
        path = self._files.path(entry.file)
        if path.is_file() and (found := path.stat().st_size) != entry.bytes:
            raise CorruptGalleryError(f"{path}: expected {entry.bytes} bytes, found {found}")
        file = IndexFile(path, entry.xxh3, manifest.spec.image_dim, entry.facts)
        index = ImageIndex.load(file, manifest.index_options, self._rows, grows)
        if len(index) != entry.images:
            raise CorruptGalleryError(f"{entry.file}: expected {entry.images} images, found {len(index)}")
        for block in self._rows.blocks(entry.images):
            index.add(block)
        return index

    def key_table(self) -> KeyTable:
        """Return the key table over every row: from its file, with the rows that it does not cover from the shards."""
        with self._lock:
            if self._key_table is None:
                self._key_table = self.build_key_table(self._filed_key_table())
            return self._key_table

    def build_key_table(self, filed: KeyTable | None = None) -> KeyTable:
        """Build the key table from the shards.

        Args:
            filed: a table of the first rows, to be extended; None: read every shard.
        """
        table = filed or KeyTable()
        return table.extended(
            key
            for number, first in enumerate(self._starts[:-1])
            if self._starts[number + 1] > len(table)
            for key in self._stored_keys(number, max(0, len(table) - first))
        )

    def _stored_keys(self, number: int, start: int) -> list[bytes]:
        """Return the keys of a shard's rows from `start` on, in UTF-8; those of removed rows are not checked."""
        kept = ~self._manifest.shards[number].removed_mask[start:]
        names = self._rows.names(self._starts[number] + start, len(kept))
        for row in np.flatnonzero(kept).tolist():
            names.check(row)
        stored: list[bytes] = names.column(0).stored.tolist()
        return stored

    def _filed_key_table(self) -> KeyTable | None:
        if self._manifest.keys is None:
            return None
        try:
            return self.load_key_table()
        except CorruptGalleryError as error:
            warnings.warn(f"key table is rebuilt from the shards: {error}", stacklevel=2)
            return None

    def load_key_table(self) -> KeyTable:
        """Read the key table's file, which may cover fewer rows than the snapshot has.

        Raises:
            CorruptGalleryError: the file is missing, or not what was written.
        """
        entry = self._manifest.keys
        assert entry is not None
        return KeyTable.load(self._files.path(entry.file), entry.images, entry.bytes, entry.xxh3)

    def continue_key_table(self, before: IndexReader, added: Collection[str]) -> None:
        """Take over the key table of the snapshot before a commit, if that table was loaded and ids are still the same.

        Looking up keys must not cost a pass over all shards at every commit.

        Args:
            before: reader of the snapshot before.
            added: keys of the rows that the commit added, in their order.
        """
        ours, theirs = ([shard.file for shard in one._manifest.shards] for one in (self, before))
        same_ids = ours[: len(theirs)] == theirs and self._manifest.rows == before._manifest.rows + len(added)
        if before._key_table is not None and same_ids:
            self._key_table = before._key_table.extended(key.encode() for key in added)

    def files_are_good(self) -> bool:
        """Return whether the files of image index and key table exist and are what was written."""
        if self._manifest.index is None or self._manifest.keys is None:
            return False
        try:
            self.load_image_index()
            self.load_key_table()
        except CorruptGalleryError:
            return False
        return True
