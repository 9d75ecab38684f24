"""The one writer of a gallery: shards first, then the manifest that names them.

A commit makes everything appended, replaced and removed so far one new generation. Killed at any instant, the gallery
is as it was at the last commit; what was written after it is swept away by the next writer.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from ..errors import FeatureError, GalleryError, KeyConflictError, OptionError
from ..extractors.features import Features
from ..options import IndexOptions
from ..system.atomic_files import publish, storage_errors
from ..system.failpoints import failpoint
from .cleanup import discard_unnamed, sweep
from .locks import WriterLock
from .manifest import Manifest, ShardEntry
from .secondary_indexes import index_lags, keys_lag, with_index, write_keys
from .shard_writer import ShardWriter
from .snapshot import Snapshot

MAX_KEY_BYTES = 4096  # a path's length


@dataclass(frozen=True)
class Appended:
    """What became of appended images, by number."""

    added: int = 0
    replaced: int = 0  # of those added: they took the place of other content under the same key
    unchanged: int = 0  # there already, with the same content


class GalleryWriter:
    """A context manager: holds the lock; commits on leaving, unless by an exception other than Ctrl-C.

    Raises:
        GalleryLockedError: another process is writing, and did not finish within `timeout` seconds.
    """

    def __init__(self, folder: Path, timeout: float = 0) -> None:
        self.folder = folder
        self._pid = os.getpid()
        self._lock = WriterLock(folder, timeout)
        self._shard: ShardWriter | None = None
        # The writer's own view of the gallery, one commit after another.
        self.generation = Snapshot(folder, Manifest.read(folder))
        self._halfway = False  # between the first and the last row of an append, or within the end of a shard
        self._finished: list[ShardEntry] = []  # shards that no commit names yet
        self._pending: dict[str, str] = {}  # key -> digest, of rows since the last commit
        self._tombstones: set[int] = set()  # ids to remove with the next commit

    def __enter__(self) -> GalleryWriter:
        with storage_errors(f"cannot write to {self.folder}"):
            self._lock.acquire()
            try:
                self.generation = Snapshot(self.folder, Manifest.read(self.folder))
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
            elif kind is KeyboardInterrupt and self._pending and not self._halfway:  # only what is whole
                self.commit()
            else:
                if self._shard is not None:
                    self._shard.abort()
                with contextlib.suppress(GalleryError, OSError):  # else the next writer does it
                    discard_unnamed(self.folder)
        finally:
            self.generation.close()
            self._lock.release()

    def status(self, key: str, digest: str, source: str | None = None) -> str:
        """Tell how content compares with the gallery's under that key.

        Args:
            key: of the image.
            digest: of its content.
            source: path of its file.

        Returns:
            "new", the "same", "differs", or "moved": the same, but patches are recomputed from a file elsewhere.
        """
        return self._states([key], [digest], [source])[0]

    def _states(self, keys: Sequence[str], digests: Sequence[str], sources: Sequence[str | None]) -> list[str]:
        pending = [self._pending.get(key) for key in keys]  # first: a commit by another thread moves them on
        generation, tombstones = self.generation, self._tombstones
        ids = [None if row_id in tombstones else row_id for row_id in generation.find_all(keys)]
        there = [row_id for row_id in ids if row_id is not None]
        stored = dict(zip(there, generation.digests(there), strict=True))
        states = []
        for digest, source, waiting, row_id in zip(digests, sources, pending, ids, strict=True):
            if waiting is not None:
                states.append("same" if waiting == digest else "differs")
            elif row_id is None:
                states.append("new")
            elif stored[row_id] != digest:
                states.append("differs")
            else:
                moved = source is not None and generation.source(row_id) not in (None, source)
                states.append("moved" if moved else "same")
        return states

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
            digests: n digests of the content that the features are of; None: of the features themselves.
            replace: put other content under an existing key in its place, rather than refuse it.
            sources: n paths of the image files; kept, and needed, where the gallery recomputes patches from them.

        Raises:
            OptionError: the gallery recomputes patches, and sources or digests are missing.
            FeatureError: wrong shapes, NaN or infinity, keys that do not fit.
            KeyConflictError: a key is there with other content.
            GalleryError: the disk is full or refuses.
        """
        self._check_process()
        manifest = self.generation.manifest
        features = manifest.spec.cast(features)
        _check_keys(keys, len(features))
        sources = self._check_sources(sources, digests, len(features))
        if digests is None:
            digests = [_features_digest(features, row) for row in range(len(keys))]
        _check_texts("digests", digests, len(keys))
        if manifest.patches == "recompute":
            features = Features(features.image, [])
        files: Sequence[str | None] = sources or [None] * len(keys)
        states = self._states(keys, digests, files)
        if "differs" in states and not replace:
            key = keys[states.index("differs")]
            raise KeyConflictError(
                f"{self.folder}: key {key!r} is there with other content; replace it (--replace), or use another key"
            )
        passed_over = ("same",) if replace else ("same", "moved")
        taken = [row for row, state in enumerate(states) if state not in passed_over]
        if any(keys[row] in self._pending for row in taken):
            self.commit()  # what takes their place can only remove rows that have an id
        self._halfway = True
        step = max(1, manifest.shard_bytes // manifest.bytes_per_image)  # images that fill a shard
        for start in range(0, len(taken), step):
            rows = taken[start : start + step]
            texts = [[texts[row] for row in rows] for texts in (keys, digests, sources) if texts]
            self._write(features[rows], *texts)
            self._pending.update((keys[row], digests[row]) for row in rows)
        # In the same commit as the rows that take their place.
        replaced = [keys[row] for row in taken if states[row] != "new"]
        self._tombstones |= {row_id for row_id in self.generation.find_all(replaced) if row_id is not None}
        self._halfway = False
        if self._finished:
            self.commit()
        return Appended(len(taken), len(replaced), len(keys) - len(taken))

    def adopt(self, temporary: Path, size: int, keys: Sequence[str], digests: Sequence[str]) -> Appended:
        """Name and commit a complete shard that another process has written under a temporary name.

        Args:
            temporary: its file, in the folder of the shards.
            size: of the file, in bytes.
            keys: of its n images, each once; those that are in the gallery are replaced.
            digests: n digests.

        Raises:
            FeatureError: keys that do not fit.
            GalleryError: the disk is full or refuses.
        """
        _check_keys(keys, len(digests))
        self.commit()
        replaced = {row_id for row_id in self.generation.find_all(keys) if row_id is not None}
        self._halfway = True
        file = f"shards/{self.generation.manifest.next_shard:06d}.h5"
        with storage_errors(f"cannot write {self.folder / file}"):
            publish(temporary, self.folder / file)
        failpoint("adopted")
        self._finished.append(ShardEntry(file, len(keys), size))
        self._pending.update(zip(keys, digests, strict=True))
        self._tombstones |= replaced
        self._halfway = False
        self.commit()
        return Appended(len(keys), len(replaced))

    def _check_sources(
        self, sources: Sequence[str] | None, digests: Sequence[str] | None, n: int
    ) -> Sequence[str] | None:
        """Return the paths to keep: of n image files where patches are recomputed, none where they are stored."""
        if self.generation.manifest.patches == "stored":
            return None
        if sources is None or digests is None:  # a digest of features says nothing of a file
            raise OptionError(
                f"{self.folder}: it recomputes patches from image files, so it cannot take features without them; "
                "use add_images, or make a gallery with patches 'stored'"
            )
        _check_texts("sources", sources, n)
        return sources

    def _write(
        self, features: Features, keys: Sequence[str], digests: Sequence[str], sources: Sequence[str] = ()
    ) -> None:
        """Write to the open shard, and finish it when it is full."""
        manifest = self.generation.manifest
        if self._shard is None:
            number = manifest.next_shard + len(self._finished)
            self._shard = ShardWriter(self.folder / f"shards/{number:06d}.h5", manifest.spec, manifest.patches)
        self._shard.append(keys, digests, features, sources)
        if len(self._shard) * manifest.bytes_per_image >= manifest.shard_bytes:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            halfway, self._halfway = self._halfway, True  # a shard cannot be finished twice, were this interrupted
            size = self._shard.finish()
            self._finished.append(ShardEntry(f"shards/{self._shard.path.name}", len(self._shard), size))
            self._shard, self._halfway = None, halfway
            failpoint("finished a shard")

    def remove(self, keys: Sequence[str]) -> None:
        """Remove images by key; their rows stay in the shards until compact.

        Raises:
            OptionError: a key that is not in the gallery; then none is removed.
        """
        if self._pending:
            self.commit()
        found = self.generation.find_all(keys)
        if None in found:
            key = keys[found.index(None)]
            raise OptionError(f"{self.folder}: expected keys of images in it, found {key!r}, which is not")
        self._tombstones |= {row_id for row_id in found if row_id is not None}

    def put_in_place(
        self,
        row_ids: Collection[int],
        keys: Sequence[str],
        digests: Sequence[str],
        features: Features,
        sources: Sequence[str] = (),
    ) -> None:
        """Append images, whose features were cast, and remove damaged rows, whose keys may not be told; see repair."""
        if self.generation.manifest.patches == "recompute":
            features = Features(features.image, [])
        self._halfway = True
        self._write(features, keys, digests, sources)
        self._pending.update(zip(keys, digests, strict=True))
        self._tombstones |= set(row_ids)
        self._halfway = False

    def remove_rows(self, row_ids: Collection[int]) -> None:
        """Remove images by id, as those whose key is damaged."""
        self._tombstones |= set(row_ids)

    def commit(self) -> None:
        """Make what was appended and removed since the last commit a new generation."""
        self._check_process()
        self._finish_shard()
        if self._finished or self._tombstones:
            manifest = self.generation.manifest
            shards = _with_tombstones(self.generation, self._tombstones)
            self._publish(replace(manifest, shards=(*shards, *self._finished)))

    def compact(self) -> int:
        """Rewrite the shards that hold removed images or are small, without the removed images.

        Returns:
            bytes saved, once no reader needs the old files any more.
        """
        self.commit()
        manifest = self.generation.manifest
        rewrite = {
            number
            for number, entry in enumerate(manifest.shards)
            if entry.removed or entry.bytes < manifest.shard_bytes // 2
        }
        if not manifest.removed and len(rewrite) < 2:
            return 0
        return self.rewrite(rewrite)

    def rewrite(self, rewrite: Collection[int], drop: Collection[int] = ()) -> int:
        """Write the images of some shards, by number, into new ones, without the removed images.

        Args:
            rewrite: those shards.
            drop: shards to leave out, with all that is in them.

        Returns:
            bytes saved, once no reader needs the old files any more.
        """
        old, manifest = self.generation, self.generation.manifest
        for number in sorted(rewrite):
            shard = old.shard(number)
            for row in np.flatnonzero(~manifest.shards[number].removed_mask).tolist():
                texts = [[texts[row]] for texts in (shard.keys, shard.digests, shard.sources) if texts is not None]
                self._write(
                    Features(shard.image_feature(row)[None], [level[None] for level in shard.read(row)]), *texts
                )
            failpoint("read a shard to compact")
        self._finish_shard()
        kept = [entry for number, entry in enumerate(manifest.shards) if number not in {*rewrite, *drop}]
        saved = sum(entry.bytes for entry in manifest.shards) - sum(entry.bytes for entry in (*kept, *self._finished))
        # Ids are counted anew, so the old index and key table are of no use to the new generation.
        self._publish(replace(manifest, shards=(*kept, *self._finished), index=None, keys=None))
        return saved

    def finish(self) -> None:
        """Commit, and write the derived files anew when they have fallen behind; readers fill in the rest."""
        self.commit()
        manifest = self.generation.manifest
        if index_lags(manifest):
            self.write_index()
        elif keys_lag(manifest):
            self._publish(replace(manifest, keys=write_keys(self.generation)))

    def write_index(self, options: IndexOptions | None = None) -> None:
        """Commit an image index and a key table over every row of this generation; see derived.with_index."""
        self.commit()
        self._publish(with_index(self.generation, options))

    def _publish(self, manifest: Manifest) -> None:
        next_shard = manifest.next_shard + len(self._finished)
        manifest = replace(manifest, generation=manifest.generation + 1, next_shard=next_shard)
        with storage_errors(f"cannot write {self.folder}"):
            manifest.write(self.folder)
        failpoint("committed")
        self.generation.close()
        self.generation = self.generation.followed_by(manifest, self._pending)
        self._finished, self._pending, self._tombstones = [], {}, set()

    def _check_process(self) -> None:
        """Refuse what a forked process would write beside its parent, in the same files."""
        if os.getpid() != self._pid:
            raise GalleryError(
                f"{self.folder}: expected process {self._pid}, which is writing to it, found {os.getpid()}, forked "
                "from it; write in one of them"
            )

    def sweep(self) -> None:
        """Delete what the last commit does not name, unless a reader may be using it."""
        sweep(self.folder, self.generation.manifest)


def _with_tombstones(generation: Snapshot, ids: set[int]) -> list[ShardEntry]:
    rows: dict[str, list[int]] = {}
    for file, row in map(generation.identity, ids):
        rows.setdefault(file, []).append(row)
    shards = generation.manifest.shards
    return [shard.without(rows[shard.file]) if shard.file in rows else shard for shard in shards]


def _check_keys(keys: Sequence[str], n: int) -> None:
    _check_texts("keys", keys, n)
    if len(set(keys)) != n:
        twice = next(key for key, times in Counter(keys).items() if times > 1)
        raise FeatureError(f"keys: expected each once, found {twice!r} twice")


def _check_texts(name: str, texts: Sequence[str], n: int) -> None:
    if len(texts) != n:
        raise FeatureError(f"{name}: expected {n}, one for each image, found {len(texts)}")
    for text in texts:
        try:
            ok = "\0" not in text and 1 <= len(text.encode()) <= MAX_KEY_BYTES
        except (AttributeError, TypeError, UnicodeEncodeError):
            ok = False
        if not ok:
            raise FeatureError(f"{name}: expected text of 1 to {MAX_KEY_BYTES} bytes without NUL, found {text!r:.80}")


def _features_digest(features: Features, row: int) -> str:
    digest = xxhash.xxh3_128()
    for array in (features.image, *features.levels):
        digest.update(array[row].data)
    return f"xxh3:{digest.hexdigest()}"
