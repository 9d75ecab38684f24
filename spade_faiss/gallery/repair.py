"""Mending a gallery: re-extract damaged images from their files, and rebuild image index and key table.

No shard is changed in place. A re-extracted image is appended, and its damaged row removed, in one commit. When nothing
damaged counts any more, the shards concerned are rewritten without such rows. Killed at any instant, the gallery opens
at one of these commits, and the same call continues from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..arrays import Pixels
from ..errors import CorruptGalleryError, ImageError
from ..extractors.registry import Extractor
from ..images.decode import decode, read_file
from ..images.sources import list_sources
from ..images.tiling import cut
from ..ingest.image_reader import absolute
from ..store.shard_format import DAMAGED_NAMES
from ..store.snapshot import Snapshot
from ..store.source_images import FILE_DIGEST, SourceImages, content_digest
from ..store.writer import GalleryWriter
from ..system.prefetch import batched


@dataclass
class Repair:
    """What repair did."""

    extracted: list[str] = field(default_factory=list)  # keys of images that were re-extracted
    dropped: list[str] = field(default_factory=list)  # what was removed: keys, and files of shards
    dropped_images: int = 0
    derived: bool = False  # image index and key table were rebuilt


def repair(
    writer: GalleryWriter, extractor: Extractor | None, folders: Sequence[Path], drop_unreadable: bool
) -> Repair:
    """Mend the shards, then image index and key table; see Gallery.repair."""
    done, damage = Repair(), _Damage.of(writer.snapshot)
    if extractor is not None:
        done.extracted = _re_extract(writer, damage, extractor, folders)
    if drop_unreadable:
        _drop(writer, damage, done)
    writer.commit()
    mended = not damage.images and (drop_unreadable or not damage.unreadable)
    if mended and (damage.shards or damage.unreadable):  # else the index, which needs every row, could not be built
        writer.rewrite(damage.shards - damage.unreadable, damage.unreadable)
    snapshot = writer.snapshot
    if snapshot.manifest.rows and not snapshot.indexes.files_are_good():
        with suppress(CorruptGalleryError):  # a shard that is left as it is; verify reports it
            writer.write_index(snapshot.manifest.index_options)
            done.derived = True
    return done


@dataclass
class _Damage:
    """What is damaged in a snapshot."""

    images: dict[int, str] = field(default_factory=dict)  # id of an image that counts -> what is wrong with it
    shards: set[int] = field(default_factory=set)  # numbers of shards with damaged rows, removed ones included
    unreadable: set[int] = field(default_factory=set)  # numbers of shards

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Damage:
        """Read all shards."""
        damage, first = cls(), 0
        for number, entry in enumerate(snapshot.manifest.shards):
            try:
                for row, message in snapshot.shard(number).damaged().items():
                    damage.shards.add(number)
                    if not entry.is_removed(row):
                        damage.images[first + row] = message
            except CorruptGalleryError:
                damage.unreadable.add(number)
            first += entry.images
        return damage


def _re_extract(writer: GalleryWriter, damage: _Damage, extractor: Extractor, folders: Sequence[Path]) -> list[str]:
    """Put the damaged images whose files are found in place, and take them off the damage; returns their keys."""
    snapshot, extracted = writer.snapshot, []
    for batch in batched(_found(snapshot, damage, folders), extractor.batch_size):
        features = extractor.extract([image.view for image in batch])
        row_ids = [image.row_id for image in batch]
        keys, digests = [image.key for image in batch], [image.digest for image in batch]
        paths = [image.path for image in batch if image.path is not None]
        writer.put_in_place(row_ids, keys, digests, features, paths)
        extracted += keys
        for row_id in row_ids:
            del damage.images[row_id]
    return extracted


def _drop(writer: GalleryWriter, damage: _Damage, done: Repair) -> None:
    """Remove the images that are still damaged, and note what goes with the unreadable shards."""
    snapshot, shards = writer.snapshot, writer.snapshot.manifest.shards
    unreadable = [shards[number] for number in sorted(damage.unreadable)]
    done.dropped = [snapshot.shown(row_id) for row_id in damage.images] + [shard.file for shard in unreadable]
    done.dropped_images = len(damage.images) + sum(shard.images - shard.removed_count for shard in unreadable)
    writer.remove_rows(damage.images)
    damage.images = {}


@dataclass(frozen=True)
class _Names:
    """The names of an image in a shard."""

    key: str
    digest: str
    path: str | None  # if the gallery recomputes patches


@dataclass(frozen=True)
class _Found(_Names):
    """A damaged image's names, and the network's view of its file."""

    row_id: int
    view: Pixels


def _found(snapshot: Snapshot, damage: _Damage, folders: Sequence[Path]) -> Iterator[_Found]:
    """Yield the damaged images whose files are found."""
    originals = SourceImages(snapshot, folders)
    unnamed = {row_id for row_id, message in damage.images.items() if message == DAMAGED_NAMES}
    files = _CandidateFiles(snapshot, damage, folders) if unnamed else None
    for row_id in list(damage.images):  # which shrinks meanwhile
        try:
            if files and row_id in unnamed:
                named = files.named_as(row_id)
                if named is None:
                    continue
                content, names = named
            else:
                [key], [digest] = snapshot.keys([row_id]), snapshot.digests([row_id])
                names = _Names(key, digest, snapshot.source(row_id))
                if not digest.startswith(FILE_DIGEST):  # a digest of features: no file can be compared with it
                    continue
                content, _ = originals.find(row_id)
            spec = snapshot.manifest.spec
            pixels = decode(content, names.key, spec.bits)
            view = spec.view.apply(cut(pixels, spec.tiling.box(names.key, pixels.shape[:2])))
        except (ImageError, CorruptGalleryError):
            continue
        yield _Found(names.key, names.digest, names.path, row_id, view)


class _CandidateFiles:
    """Image files that may belong to images whose names are damaged: files with a key that no good row has."""

    def __init__(self, snapshot: Snapshot, damage: _Damage, folders: Sequence[Path]) -> None:
        self._snapshot = snapshot
        good = [
            row_id
            for row_id in snapshot.ids().tolist()
            if row_id not in damage.images and snapshot.shard_number(row_id) not in damage.unreadable
        ]
        taken = set(snapshot.keys(good))
        self._files = [file for file in (list_sources(folders) if folders else []) if file.key not in taken]
        self._digests: dict[Path, str] = {}

    def named_as(self, row_id: int) -> tuple[bytes, _Names] | None:
        """Return the content and the names of the file that agrees with what is left of an image's names."""
        names = self._snapshot.rows.names(row_id)
        key, digest, *kept = names.all_shown(0)
        candidates = [(file.key, file.path, absolute(file)) for file in self._files]
        candidates += [(key, Path(path), path) for path in kept if Path(path).is_file()]
        for name, path, place in candidates:
            if path not in self._digests:
                try:
                    self._digests[path] = content_digest(read_file(path))
                except ImageError:  # another candidate may be the image's file
                    continue
            found = _Names(name, self._digests[path], place if kept else None)
            # Either the checksum is good and agrees, or the checksum itself is damaged, or the path is.
            if names.were(0, found.key, found.digest, found.path) or (found.key, found.digest) == (key, digest):
                return read_file(path), found
        return None
