"""The files of a gallery that can be built from its shards at any time: image index and key table, written anew."""

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

GROWTH = 2  # times the images that there were when it was built
IMBALANCE = 2  # times the imbalance of its lists when it was built


@dataclass(frozen=True)
class IndexState:
    """The file of the index, where there is one, and why it should be built anew, where it should."""

    entry: IndexEntry | None
    rows: int  # of the gallery, which the file may not all cover
    outgrown: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> IndexState:
        """Look at a generation's index."""
        entry, wanted = manifest.index, manifest.index_options
        if entry is None:
            return cls(None, manifest.rows)
        facts, why = entry.facts, []
        if entry.trained and manifest.rows >= GROWTH * max(entry.trained, IVF_FROM):
            why.append(f"{manifest.rows} images, built for {entry.trained}")
        if facts.imbalance > IMBALANCE * facts.imbalance_trained:
            why.append(
                f"lists of uneven length (imbalance {facts.imbalance:.1f}, {facts.imbalance_trained:.1f} at first)"
            )
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
            text += f"; outgrown, `reindex` builds it anew: {'; '.join(self.outgrown)}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        if self.entry is None:
            return {"file": None}
        facts = {
            f"{'measured_' if name == 'recall' else ''}{name}": value
            for name, value in asdict(self.entry.facts).items()
        }
        rest = {"file": self.entry.file, "bytes": self.entry.bytes, "images": self.entry.images}
        return {**facts, **rest, "trained": self.entry.trained, "outgrown": list(self.outgrown)}


INDEX_LAG = 0.02  # the file of the index is written anew when this share of the images is not in it
KEYS_LAG = 32  # ... and that of the key table also when so many shards are not in it: each is opened to look a key up
INDEX_GROWTH = 2  # ... and a small index is trained anew when the images have grown by this factor since


def index_lags(manifest: Manifest) -> bool:
    """Tell whether many images are not in the file of the index."""
    covered = manifest.index.images if manifest.index else 0
    return manifest.rows - covered > INDEX_LAG * manifest.rows


def keys_lag(manifest: Manifest) -> bool:
    """Tell whether many images, or many shards, are not in the file of the key table."""
    covered = manifest.keys.images if manifest.keys else 0
    lately = sum(shard.images for shard in manifest.shards[-KEYS_LAG:])
    return manifest.rows - covered > min(lately, INDEX_LAG * manifest.rows)


def with_index(generation: Snapshot, options: IndexOptions | None = None) -> Manifest:
    """Write an index and a key table over every row of a generation; returns a manifest that names them.

    The last index is grown while it serves; built anew it is with `options`, when there is none yet, or when a small
    one has been outgrown. A large one is built anew only when that is asked for: see IndexState.

    Args:
        generation: the last one.
        options: build both anew, and keep these for the gallery; None: see above.

    Raises:
        OptionError: the index that `options` ask for does not reach their recall; the old one stays.
    """
    manifest = generation.manifest
    trained = manifest.index.trained if manifest.index else 0
    small = trained < IVF_FROM and manifest.rows >= INDEX_GROWTH * trained
    index = None if options or small else _grown_index(generation)
    if index is None:
        index, trained = generation.build_index(options), manifest.rows
        if index.stands_in:
            trained = 0  # try again at the next chance
    else:
        index.tune()
    if options:
        _check_recall(index.facts, options)
        manifest = replace(manifest, index_options=options)
    name = f"index/image-{manifest.generation + 1:06d}.faiss"
    path = generation.folder / name
    checksum = index.save(path)
    entry = IndexEntry(name, len(index), trained, path.stat().st_size, checksum, index.facts)
    return replace(manifest, index=entry, keys=write_keys(generation, rebuild=options is not None))


def write_keys(generation: Snapshot, rebuild: bool = False) -> KeysEntry:
    """Write a key table over every row of a generation: grown, or built from the shards."""
    table = generation.build_key_table() if rebuild else generation.key_table()
    name = f"index/keys-{generation.manifest.generation + 1:06d}.npy"
    return KeysEntry(name, len(table), *table.save(generation.folder / name))


def _grown_index(generation: Snapshot) -> ImageIndex | None:
    """Return the last index with what has been added since; None: it is gone or damaged."""
    try:
        return generation.load_index_file(grows=True)
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
