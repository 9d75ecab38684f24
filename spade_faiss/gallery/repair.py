"""Mending a gallery: damaged images are extracted anew from their files, those alone.

Nothing is changed where it lies. An image extracted anew is appended, and its damaged row removed, in one commit; when
nothing damaged counts any more, the shards concerned are written anew without such rows. Killed at any instant, the
gallery opens at one of these commits, and the same call goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..arrays import Pixels
from ..errors import CorruptGalleryError, ImageError
from ..extractors.registry import Extractor
from ..images.decode import decode, read_file
from ..images.sources import find_images
from ..ingest.image_reader import absolute
from ..store.shard_format import DAMAGED_NAMES
from ..store.snapshot import Snapshot
from ..store.source_images import FILE_DIGEST, SourceImages, content_digest
from ..store.writer import GalleryWriter
from ..system.prefetch import batched


@dataclass
class Repair:
    """What was done."""

    extracted: list[str] = field(default_factory=list)  # keys of images that are as they were, from their files
    dropped: list[str] = field(default_factory=list)  # what was taken out: keys, and files of shards
    dropped_images: int = 0
    derived: bool = False  # image index and key table were built anew


@dataclass(frozen=True)
class Damage:
    """What of a generation is damaged."""

    images: dict[int, str]  # id of an image that counts -> what is wrong
    shards: set[int]  # numbers of shards with damaged rows, removed ones included
    unreadable: set[int]  # numbers of shards

    @classmethod
    def of(cls, generation: Snapshot) -> Damage:
        """Read all shards."""
        damage, first = cls({}, set(), set()), 0
        for number, entry in enumerate(generation.manifest.shards):
            try:
                for row, what in generation.shard(number).damaged().items():
                    damage.shards.add(number)
                    if not entry.is_removed(row):
                        damage.images[first + row] = what
            except CorruptGalleryError:
                damage.unreadable.add(number)
            first += entry.images
        return damage


@dataclass(frozen=True)
class _Found:
    """A damaged image's names, and what the network sees of its file."""

    row_id: int
    key: str
    digest: str
    source: str | None
    view: Pixels


def repair(
    writer: GalleryWriter, extractor: Extractor | None, folders: Sequence[Path], drop_unreadable: bool
) -> Repair:
    """Mend the shards; see Gallery.repair."""
    done, damage = Repair(), Damage.of(writer.snapshot)
    generation = writer.snapshot
    left = dict(damage.images)
    if extractor is not None:
        for batch in batched(_found(generation, damage, folders), extractor.batch_size):
            features = extractor.extract([image.view for image in batch])
            sources = [image.source for image in batch if image.source is not None]
            keys, digests = [image.key for image in batch], [image.digest for image in batch]
            writer.put_in_place([image.row_id for image in batch], keys, digests, features, sources)
            done.extracted += keys
            for image in batch:
                del left[image.row_id]
    if drop_unreadable:
        shards = generation.manifest.shards
        done.dropped = [generation.shown(row_id) for row_id in left] + [
            shards[n].file for n in sorted(damage.unreadable)
        ]
        done.dropped_images = len(left) + sum(
            shards[number].images - shards[number].removed_count for number in damage.unreadable
        )
        writer.remove_rows(left)
        left.clear()
    writer.commit()
    whole = not left and (drop_unreadable or not damage.unreadable)
    if whole and (damage.shards or damage.unreadable):  # else the index, which needs every row, could not be built
        writer.rewrite(damage.shards - damage.unreadable, damage.unreadable)
    return done


def _found(generation: Snapshot, damage: Damage, folders: Sequence[Path]) -> Iterator[_Found]:
    """Yield those damaged images whose files are there."""
    originals = SourceImages(generation, folders)
    unnamed = {row_id for row_id, what in damage.images.items() if what == DAMAGED_NAMES}
    files = _Files(generation, damage, folders) if unnamed else None
    for row_id in damage.images:
        try:
            if files and row_id in unnamed:
                named = files.named_as(row_id)
                if named is None:
                    continue
                content, (key, digest, source) = named
            else:
                [key], [digest], source = (
                    generation.keys([row_id]),
                    generation.digests([row_id]),
                    generation.source(row_id),
                )
                if not digest.startswith(FILE_DIGEST):  # of features: no file tells that it is the one
                    continue
                content, _ = originals.find(row_id)
            view = generation.manifest.spec.view.apply(decode(content, key))
        except (ImageError, CorruptGalleryError):
            continue
        yield _Found(row_id, key, digest, source, view)


Named = tuple[str, str, str | None]  # key, digest and path of an image, as they are in a shard


class _Files:
    """Image files that may be those of images whose names are damaged: whose keys no good row has."""

    def __init__(self, generation: Snapshot, damage: Damage, folders: Sequence[Path]) -> None:
        self._generation = generation
        good = [
            row_id
            for row_id in generation.ids().tolist()
            if row_id not in damage.images and generation.shard_number(row_id) not in damage.unreadable
        ]
        taken = set(generation.keys(good))
        self._sources = [source for source in (find_images(folders) if folders else []) if source.key not in taken]
        self._digests: dict[Path, str] = {}

    def named_as(self, row_id: int) -> tuple[bytes, Named] | None:
        """Return the content and the names of the file that agrees with what is left of an image's names."""
        names = self._generation.rows.names(row_id)
        key, digest, *kept = names.all_shown(0)
        candidates = [(source.key, source.path, absolute(source)) for source in self._sources]
        candidates += [(key, Path(path), path) for path in kept if Path(path).is_file()]
        for name, path, place in candidates:
            if path not in self._digests:
                self._digests[path] = content_digest(read_file(path))
            found: Named = name, self._digests[path], place if kept else None
            # Either the checksum is good and says so, or it is damaged itself, or the path is.
            if names.were(0, *found) or found[:2] == (key, digest):
                return read_file(path), found
        return None
