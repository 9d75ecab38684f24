"""Writes a gallery's secondary indexes, image index and key table, and says when they are due to be rewritten.

Both can be rebuilt from the shards at any time. IndexReader reads them.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import CorruptGalleryError, OptionError
from ..index.factory import IVF_FROM
from ..index.image_index import ImageIndex
from ..index.metadata import IndexFacts
from ..options import IndexOptions
from .manifest import IndexEntry, KeysEntry, Manifest
from .snapshot import Snapshot

INDEX_LAG = 0.02  # both files are rewritten when they lack this share of the rows
KEYS_LAG = 32  # the key table also when it lacks this many shards: a look-up opens each of them
SMALL_GROWTH = 2  # a small index is retrained by itself when the images have grown by this factor since it was trained
OUTGROWN_GROWTH = 2  # a large one is reported as outgrown then, and is only rebuilt on request
REMOVED = 0.5  # likewise when more than this share of the rows of an IVF index is removed
OUTGROWN_IMBALANCE = 2  # likewise when the imbalance of its lists has grown by this factor


@dataclass(frozen=True)
class IndexState:
    """The file of the image index, and the reasons to rebuild it."""

    entry: IndexEntry | None  # None: not written yet
    rows: int  # of the gallery; the file may cover fewer
    outgrown: tuple[str, ...] = ()  # reasons to rebuild it, in words

    @classmethod
    def of(cls, manifest: Manifest) -> IndexState:
        """Return the state of a commit's index."""
        entry, wanted = manifest.index, manifest.index_options
        if entry is None:
            return cls(None, manifest.rows)
        facts, why = entry.facts, []
        if entry.trained and manifest.rows >= OUTGROWN_GROWTH * max(entry.trained, IVF_FROM):
            why.append(f"{manifest.rows} images, built for {entry.trained}")
        if facts.imbalance > OUTGROWN_IMBALANCE * facts.imbalance_trained:
            why.append(
                f"lists of uneven length (imbalance {facts.imbalance:.1f}, {facts.imbalance_trained:.1f} at first)"
            )
        if facts.nprobe and manifest.removed > REMOVED * manifest.rows:
            why.append(f"{manifest.removed} of {manifest.rows} images removed, which its recall was measured with")
        if facts.recall is not None and facts.recall < wanted.recall:
            why.append(f"recall {facts.recall:.3f}, less than the {wanted.recall:g} wanted")
        return cls(entry, manifest.rows, tuple(why))

    def __str__(self) -> str:
        if self.entry is None:
            return "not written yet"
        facts = self.entry.facts
        text = f"{facts.factory}, {self.entry.bytes / 1e6:.1f} MB"
        if facts.recall is not None:
            visited = f"{facts.nprobe} lists visited, " if facts.nprobe else ""
            found = f"recall@{facts.k} {facts.recall:.3f} of normal images and of points between"
            text += f"; {found} ({visited}{facts.candidates:g} candidates for each neighbour)"
        if self.rows > self.entry.images:
            text += f"; {self.rows - self.entry.images} newer images are filled in when it is opened"
        if self.outgrown:
            text += f"; outgrown, rebuild it with reindex: {'; '.join(self.outgrown)}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        if self.entry is None:
            return {"file": None}
        facts = {
            f"{'measured_' if name == 'recall' else ''}{name}": value
            for name, value in asdict(self.entry.facts).items()
        }
        rest = {"file": self.entry.file, "bytes": self.entry.bytes, "images": self.entry.images}
        return {**facts, **rest, "trained": self.entry.trained, "outgrown": list(self.outgrown)}


def index_lags(manifest: Manifest) -> bool:
    """Return whether the index's file lacks many rows."""
    covered = manifest.index.images if manifest.index else 0
    return manifest.rows - covered > INDEX_LAG * manifest.rows


def keys_lag(manifest: Manifest) -> bool:
    """Return whether the key table's file lacks many rows or many shards."""
    covered = manifest.keys.images if manifest.keys else 0
    lately = sum(shard.images for shard in manifest.shards[-KEYS_LAG:])
    return manifest.rows - covered > min(lately, INDEX_LAG * manifest.rows)


def with_index(snapshot: Snapshot, options: IndexOptions | None = None) -> Manifest:
    """Write an image index and a key table over every row of a snapshot; returns a manifest that names them.

    New rows are added to the last index. It is rebuilt if `options` are given, if there is none, or if it is small and
    outgrown. A large outgrown one is rebuilt only on request: see IndexState.

    Args:
        snapshot: of the last commit.
        options: rebuild both, and keep these options for the gallery; None: see above.

    Raises:
        OptionError: the index does not reach the recall of `options`; the old one stays.
    """
    manifest = snapshot.manifest
    trained = manifest.index.trained if manifest.index else 0
    small = trained < IVF_FROM and manifest.rows >= SMALL_GROWTH * trained
    index = None if options or small else _grown_index(snapshot)
    if index is None:
        index, trained = snapshot.indexes.build_image_index(options), manifest.rows
        if index.stands_in:
            trained = 0  # so that the next call tries again
    else:
        index.tune()
    if options:
        _check_recall(index.facts, options)
        manifest = replace(manifest, index_options=options)
    name = f"index/image-{manifest.generation + 1:06d}.faiss"
    path = snapshot.folder / name
    checksum = index.save(path)
    entry = IndexEntry(name, len(index), trained, path.stat().st_size, checksum, index.facts)
    return replace(manifest, index=entry, keys=write_keys(snapshot, rebuild=options is not None))


def write_keys(snapshot: Snapshot, rebuild: bool = False) -> KeysEntry:
    """Write a key table over every row of a snapshot: the last one extended, or rebuilt from the shards."""
    table = snapshot.indexes.build_key_table() if rebuild else snapshot.indexes.key_table()
    name = f"index/keys-{snapshot.manifest.generation + 1:06d}.npy"
    return KeysEntry(name, len(table), *table.save(snapshot.folder / name))


def _grown_index(snapshot: Snapshot) -> ImageIndex | None:
    """Return the last index with all newer rows; None: its file is missing or damaged."""
    try:
        return snapshot.indexes.load_image_index(grows=True)
    except CorruptGalleryError as error:
        warnings.warn(f"image index is rebuilt from the shards: {error}", stacklevel=2)
        return None


def _check_recall(facts: IndexFacts, options: IndexOptions) -> None:
    if facts.recall is not None and facts.recall < options.recall:
        how = f"{facts.nprobe} lists visited, " if facts.nprobe else ""
        raise OptionError(
            f"index {options.kind}: expected a recall of {options.recall}, found {facts.recall:.3f} of {facts.factory} "
            f"({how}{facts.candidates:g} candidates for each neighbour); ask for less recall, for another kind of "
            "index, or for more memory"
        )
