"""Writes one shard: HDF5 under a temporary name, then renamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from ..arrays import Array
from ..extractors.features import Features
from ..system.atomic_files import TEMPORARY, DeferredErrorFile, publish, storage_errors
from ..system.failpoints import failpoint
from .shard_format import NAMES, ShardSchema, checksums


class ShardWriter:
    """Writes one shard under a temporary name; finish() gives it its own."""

    def __init__(self, path: Path, schema: ShardSchema) -> None:
        self.path = path
        self.keys: list[str] = []
        self._digests: list[str] = []
        self._sources: list[str] | None = None if schema.has_levels else []
        self._image: list[Array] = []  # small beside the levels: written in one piece at the end
        self._checksums: list[list[int]] = []
        self.temporary = path.with_name(path.name + TEMPORARY)
        with storage_errors(f"cannot write {self.path}"):
            self._disk = DeferredErrorFile(self.temporary)
            self._file = h5py.File(self._disk, "w", libver="latest")
            self._levels = [
                self._file.create_dataset(
                    f"levels/{number}", (0, *shape), schema.spec.dtype, maxshape=(None, *shape), chunks=(1, *shape)
                )
                for number, shape in enumerate(schema.level_shapes)
            ]
        failpoint("opened", self.path)

    def __len__(self) -> int:
        return len(self.keys)

    def append(
        self, keys: Sequence[str], digests: Sequence[str], features: Features, sources: Sequence[str] = ()
    ) -> None:
        """Append n images.

        Args:
            keys: n names.
            digests: n digests.
            features: of n images, as ShardSchema.stored returns them.
            sources: n paths of image files, in a shard without levels.

        Raises:
            GalleryError: the disk is full or refuses; call abort() then.
        """
        start = len(self.keys)
        with storage_errors(f"cannot write {self.path}"):
            for dataset, level in zip(self._levels, features.levels, strict=True):
                dataset.resize(start + len(keys), axis=0)
                for row in range(len(keys)):  # straight into the chunk: no selection, no conversion
                    dataset.id.write_direct_chunk((start + row, 0, 0, 0), level[row])
            self._disk.check()
        failpoint("appended to", self.path)
        self._image.append(features.image.copy())
        named: Sequence[str | None] = [None] * len(keys) if self._sources is None else sources
        self._checksums += [
            checksums(key, digest, features, row, source)
            for row, (key, digest, source) in enumerate(zip(keys, digests, named, strict=True))
        ]
        self.keys += keys
        self._digests += digests
        if self._sources is not None:
            self._sources += sources

    def finish(self) -> int:
        """Complete the file, flush it to disk and give it its name; returns its size in bytes."""
        size = self.complete()
        with storage_errors(f"cannot write {self.path}"):
            publish(self.temporary, self.path)
        return size

    def complete(self) -> int:
        """Write what is still in memory. The file keeps its temporary name. Returns its size in bytes."""
        with storage_errors(f"cannot write {self.path}"):
            for dataset in self._levels:  # an append that was interrupted may have made them longer
                dataset.resize(len(self.keys), axis=0)
            self._file.create_dataset("image", data=np.concatenate(self._image))
            failpoint("image features in", self.path)
            for name, strings in zip(NAMES, (self.keys, self._digests, self._sources), strict=True):
                if strings is None:
                    continue
                # HDF5 keeps texts of variable length in a heap without checksums, and can hang on a damaged one.
                encoded = [text.encode() for text in strings]
                utf8 = h5py.string_dtype("utf-8", max(map(len, encoded)))
                self._file.create_dataset(name, data=np.array(encoded, utf8))
            self._file.create_dataset("checksums", data=np.array(self._checksums, np.uint64))
            self._file.close()
            self._disk.check()
            self._disk.close()
            failpoint("completed", self.path)
            return self.temporary.stat().st_size

    def abort(self) -> None:
        """Delete what was written."""
        self._file.close()
        self._disk.close()
        self.temporary.unlink(missing_ok=True)
