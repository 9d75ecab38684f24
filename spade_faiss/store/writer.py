"""The one writer of a gallery: shards first, then the manifest that names them.

A commit makes everything appended, replaced and removed so far one new generation. If the process is killed, the
gallery is as it was at the last commit, and the next writer deletes what was written after it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import FeatureError, GalleryError, KeyConflictError
from ..extractors.features import Features
from ..images.tiling import listed_keys, place_of
from ..options import IndexOptions
from ..system.atomic_files import publish, storage_errors
from ..system.failpoints import failpoint
from .cleanup import discard_unnamed, sweep
from .locks import WriterLock
from .manifest import Manifest, ShardEntry
from .secondary_indexes import index_lags, keys_lag, with_index, write_keys
from .shard_format import check_keys, check_texts, features_digest
from .shard_writer import ShardWriter
from .snapshot import Snapshot
from .trusted import change_trusted, given_images


@dataclass(frozen=True)
class Appended:
    """How many appended images were added, replaced or unchanged."""

    added: int = 0
    replaced: int = 0  # those of the added that replaced other content under the same key
    unchanged: int = 0  # already in the gallery with the same content


class GalleryWriter:
    """A context manager that holds the lock; leaving it commits, unless by an exception other than Ctrl-C.

    Raises:
        GalleryLockedError: another process is writing, and did not finish within `timeout` seconds.
    """

    def __init__(self, folder: Path, timeout: float = 0) -> None:
        self.folder = folder
        self._pid = os.getpid()
        self._lock = WriterLock(folder, timeout)
        self._shard: ShardWriter | None = None
        # The writer's own view of the gallery, renewed by every commit.
        self.snapshot = Snapshot(folder, Manifest.read(folder))
        self._halfway = False  # within an append, or while a shard is being finished
        self._finished: list[ShardEntry] = []  # complete shards that no commit names yet
        self._pending: dict[str, str] = {}  # key -> digest, of rows since the last commit
        self._tombstones: set[int] = set()  # ids to remove with the next commit
        self._removed: set[str] = set()  # keys of whole images among them, which nobody trusts any longer

    def __enter__(self) -> GalleryWriter:
        with storage_errors(f"cannot write to {self.folder}"):
            self._lock.acquire()
            try:
                self.snapshot = Snapshot(self.folder, Manifest.read(self.folder))
                discard_unnamed(self.folder)
                failpoint("locked")
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._check_process()
        try:
            if kind is None:
                self.finish()
            elif kind is KeyboardInterrupt and self._pending and not self._halfway:  # every append is complete
                self.commit()
            else:
                self._drop()
        finally:
            self.snapshot.close()
            self._lock.release()

    def _drop(self) -> None:
        """Forget what was appended and removed since the last commit, and delete it."""
        if self._shard is not None:
            self._shard.abort()
        self._shard, self._halfway = None, False
        self._finished, self._pending, self._tombstones, self._removed = [], {}, set(), set()
        with contextlib.suppress(GalleryError, OSError):  # the next writer tries again
            self.snapshot.close()
            self.snapshot = Snapshot(self.folder, Manifest.read(self.folder))  # a commit may fail after it took effect
            discard_unnamed(self.folder)

    def status(self, key: str, digest: str, source: str | None = None) -> str:
        """Compare an image with the gallery's image of the same key.

        Args:
            key: of the image.
            digest: of its content.
            source: path of its file.

        Returns:
            "new", "same", "differs", or "moved": the same content, but the gallery keeps another path of its file.
        """
        return self._states([key], [digest], [source])[0][0]

    def _states(
        self, keys: Sequence[str], digests: Sequence[str], sources: Sequence[str | None]
    ) -> tuple[list[str], list[int | None]]:
        """Return the status of n images, and the ids of the images that have their keys at the last commit."""
        pending = [self._pending.get(key) for key in keys]  # first: a commit by another thread clears them
        snapshot, tombstones = self.snapshot, self._tombstones
        ids = [None if row_id in tombstones else row_id for row_id in snapshot.find_all(keys)]
        found = [row_id for row_id in ids if row_id is not None]
        stored = dict(zip(found, snapshot.digests(found), strict=True))
        states = []
        for digest, source, waiting, row_id in zip(digests, sources, pending, ids, strict=True):
            if waiting is not None:
                states.append("same" if waiting == digest else "differs")
            elif row_id is None:
                states.append("new")
            elif stored[row_id] != digest:
                states.append("differs")
            else:
                moved = source is not None and snapshot.source(row_id) not in (None, source)
                states.append("moved" if moved else "same")
        return states, ids

    def append(
        self,
        keys: Sequence[str],
        features: Features,
        digests: Sequence[str] | None = None,
        replace: bool = False,
        sources: Sequence[str] | None = None,
    ) -> Appended:
        """Append n images: refused whole or taken whole.

        Args:
            keys: n names, each once.
            features: of n images, of the gallery's spec; levels are stored in the spec's dtype.
            digests: n digests of the images' content; None: the features are digested instead.
            replace: replace other content under an existing key; False: refuse it.
            sources: n paths of the image files; required by a gallery that recomputes patches, else ignored.

        Raises:
            OptionError: the gallery recomputes patches, and sources or digests are missing.
            FeatureError: wrong shapes, NaN or infinity, keys that do not fit.
            KeyConflictError: a key exists with other content.
            GalleryError: the disk is full or refuses.
        """
        self._check_process()
        keys, manifest = listed_keys(keys, FeatureError), self.snapshot.manifest
        features = manifest.schema.stored(features)
        check_keys(keys, len(features))
        sources = manifest.schema.kept_sources(sources, digests, len(features), self.folder)
        if digests is None:
            digests = [features_digest(features, row) for row in range(len(keys))]
        check_texts("digests", digests, len(keys))
        states, ids = self._states(keys, digests, sources or [None] * len(keys))
        if "differs" in states and not replace:
            key = keys[states.index("differs")]
            raise KeyConflictError(
                f"{self.folder}: key {key!r} exists with other content; replace it (replace=True), or use another key"
            )
        passed_over = ("same",) if replace else ("same", "moved")
        taken = [row for row, state in enumerate(states) if state not in passed_over]
        replaced = [row for row in taken if states[row] != "new"]
        if uncommitted := [row for row in replaced if keys[row] in self._pending]:
            self.commit()  # only rows with an id can be removed; other ids stay as they are
            found = self.snapshot.find_all([keys[row] for row in uncommitted])
            for row, row_id in zip(uncommitted, found, strict=True):
                ids[row] = row_id
        tombstones = self._with_tiles(ids[row] for row in replaced)
        self._halfway = True
        step = max(1, manifest.shard_bytes // manifest.schema.bytes_per_image)  # images that fill a shard
        for start in range(0, len(taken), step):
            rows = taken[start : start + step]
            texts = [[texts[row] for row in rows] for texts in (keys, digests, sources) if texts]
            self._write(features[rows], *texts)
            self._pending.update((keys[row], digests[row]) for row in rows)
        self._tombstones |= tombstones  # in the same commit as the rows that replace them
        self._halfway = False
        if self._finished:
            self.commit()
        new, old, rest = (self._images(keys[row] for row in rows) for rows in (taken, replaced, range(len(keys))))
        return Appended(new, old, rest - new)

    def _images(self, keys: Iterable[str]) -> int:
        """Count images by their keys: of one in tiles, the first tile alone has the image's key."""
        return sum(not self._is_further_tile(key) for key in keys)

    def _is_further_tile(self, key: str) -> bool:
        return self.snapshot.manifest.spec.tile is not None and place_of(key) is not None

    def _with_tiles(self, ids: Iterable[int | None]) -> set[int]:
        """Return the ids of images of the last commit; of images in tiles, the ids of all their tiles."""
        found = [row_id for row_id in ids if row_id is not None]
        tiles = self.snapshot.tiles if found else None
        return set(found if tiles is None else tiles.rows_of(set(tiles.image_of(found).tolist())).tolist())

    def adopt(self, temporary: Path, size: int, keys: Sequence[str], digests: Sequence[str]) -> Appended:
        """Name and commit a complete shard that another process has written under a temporary name.

        Args:
            temporary: its file, in the folder of the shards.
            size: of the file, in bytes.
            keys: of its n images, each once; images of the gallery with these keys are replaced.
            digests: n digests.

        Raises:
            FeatureError: keys that do not fit.
            GalleryError: the disk is full or refuses.
        """
        check_keys(keys, len(digests))
        self.commit()
        ids = self.snapshot.find_all(keys)
        there = [key for key, row_id in zip(keys, ids, strict=True) if row_id is not None]
        replaced = self._with_tiles(ids)
        self._halfway = True
        file = f"shards/{self.snapshot.manifest.next_shard:06d}.h5"
        with storage_errors(f"cannot write {self.folder / file}"):
            publish(temporary, self.folder / file)
        failpoint("adopted")
        self._finished.append(ShardEntry(file, len(keys), size))
        self._pending.update(zip(keys, digests, strict=True))
        self._tombstones |= replaced
        self._halfway = False
        self.commit()
        return Appended(self._images(keys), self._images(there))

    def _write(
        self, features: Features, keys: Sequence[str], digests: Sequence[str], sources: Sequence[str] = ()
    ) -> None:
        """Write to the open shard, and finish it if that fills it."""
        manifest = self.snapshot.manifest
        if self._shard is None:
            number = manifest.next_shard + len(self._finished)
            self._shard = ShardWriter(self.folder / f"shards/{number:06d}.h5", manifest.schema)
        self._shard.append(keys, digests, features, sources)
        if len(self._shard) * manifest.schema.bytes_per_image >= manifest.shard_bytes:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            halfway, self._halfway = self._halfway, True  # Ctrl-C must not make commit finish it twice
            size = self._shard.finish()
            self._finished.append(ShardEntry(f"shards/{self._shard.path.name}", len(self._shard), size))
            self._shard, self._halfway = None, halfway
            failpoint("finished a shard")

    def remove(self, keys: Iterable[str]) -> None:
        """Remove images by key, and end their trust; their rows stay in the shards until compact().

        Raises:
            OptionError: a key is not in the gallery, or is that of a tile; no image is removed.
        """
        if self._pending:
            self.commit()
        keys = listed_keys(keys)
        self._tombstones |= self._with_tiles(given_images(self.snapshot, keys))
        self._removed.update(keys)

    def put_in_place(
        self,
        row_ids: Collection[int],
        keys: Sequence[str],
        digests: Sequence[str],
        features: Features,
        sources: Sequence[str] = (),
    ) -> None:
        """Append images and remove damaged rows, whose keys may be unreadable; see gallery.repair.

        Args:
            row_ids: ids of the damaged rows.
            keys: n names.
            digests: n digests.
            features: of n images.
            sources: n paths of the image files, if the gallery recomputes patches.
        """
        features = self.snapshot.manifest.schema.stored(features)
        self._halfway = True
        self._write(features, keys, digests, sources)
        self._pending.update(zip(keys, digests, strict=True))
        self._tombstones |= set(row_ids)
        self._halfway = False

    def remove_rows(self, row_ids: Collection[int]) -> None:
        """Remove images by id, for those whose keys are damaged."""
        self._tombstones |= set(row_ids)

    def commit(self) -> None:
        """Make everything appended and removed since the last commit a new generation."""
        self._check_process()
        if self._halfway:  # the caller has passed over an error
            raise GalleryError(
                f"{self.folder}: expected whole appends to commit, found one that failed halfway; "
                "let its error end the writer, and append again"
            )
        self._finish_shard()
        # Ctrl-C right after a commit leaves shards here that it has named.
        self._finished = [entry for entry in self._finished if entry not in self.snapshot.manifest.shards]
        if self._finished or self._tombstones:
            manifest = self.snapshot.manifest
            # First: what fails from here on leaves images that are not trusted, which can be removed again.
            change_trusted(self.folder, drop=self._removed, tiles=manifest.spec.tile is not None)
            shards = self.snapshot.shards_without(self._tombstones)
            self._publish(replace(manifest, shards=(*shards, *self._finished)))

    def compact(self) -> int:
        """Rewrite the shards that hold removed images or are small, without the removed images.

        Returns:
            bytes saved, once no reader uses the old files.
        """
        self.commit()
        manifest = self.snapshot.manifest
        rewrite = {
            number
            for number, entry in enumerate(manifest.shards)
            if entry.removed or entry.bytes < manifest.shard_bytes // 2
        }
        if not manifest.removed and len(rewrite) < 2:
            return 0
        return self.rewrite(rewrite)

    def rewrite(self, rewrite: Collection[int], drop: Collection[int] = ()) -> int:
        """Rewrite shards without their removed images. What fails changes nothing, and the writer goes on.

        Args:
            rewrite: numbers of shards to rewrite.
            drop: numbers of shards to delete with all their images.

        Returns:
            bytes saved, once no reader uses the old files.
        """
        self.commit()  # what is appended by now is no part of it
        manifest = self.snapshot.manifest
        try:
            for number in sorted(rewrite):
                shard = self.snapshot.shard(number)
                for row in np.flatnonzero(~manifest.shards[number].removed_mask).tolist():
                    texts = [[texts[row]] for texts in (shard.keys, shard.digests, shard.sources) if texts is not None]
                    levels = [level[None] for level in shard.read(row)]
                    self._write(Features(shard.image_feature(row)[None], levels), *texts)
                failpoint("read a shard to compact")
            self._finish_shard()
            kept = [entry for number, entry in enumerate(manifest.shards) if number not in {*rewrite, *drop}]
            shards = (*kept, *self._finished)
            # Ids change, so the old index and key table do not fit the new generation.
            self._publish(replace(manifest, shards=shards, index=None, keys=None))
        except BaseException:
            self._drop()
            raise
        return sum(entry.bytes for entry in manifest.shards) - sum(entry.bytes for entry in shards)

    def finish(self) -> None:
        """Commit, and rewrite the secondary indexes if they lack many rows; readers add the others."""
        self.commit()
        manifest = self.snapshot.manifest
        if index_lags(manifest):
            self.write_index()
        elif keys_lag(manifest):
            self._publish(replace(manifest, keys=write_keys(self.snapshot)))

    def write_index(self, options: IndexOptions | None = None) -> None:
        """Commit an image index and a key table over every row; see with_index."""
        self.commit()
        self._publish(with_index(self.snapshot, options))

    def _publish(self, manifest: Manifest) -> None:
        next_shard = manifest.next_shard + len(self._finished)
        manifest = replace(manifest, generation=manifest.generation + 1, next_shard=next_shard)
        with storage_errors(f"cannot write {self.folder}"):
            manifest.write(self.folder)
        failpoint("committed")
        self.snapshot.close()
        self.snapshot = self.snapshot.followed_by(manifest, self._pending)
        self._finished, self._pending, self._tombstones, self._removed = [], {}, set(), set()

    def _check_process(self) -> None:
        """Refuse to write in a forked process, beside its parent and into the same files."""
        if os.getpid() != self._pid:
            raise GalleryError(
                f"{self.folder}: expected process {self._pid}, which is writing to it, found {os.getpid()}, forked "
                "from it; write in one of them"
            )

    def sweep(self) -> None:
        """Delete what the last commit does not name, unless a reader may use it."""
        sweep(self.folder, self.snapshot.manifest)
