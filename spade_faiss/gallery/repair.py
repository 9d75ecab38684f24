"""Mending a gallery: re-extract damaged images from their files, and rebuild image index and key table.

No shard is changed in place. A re-extracted image is appended, and its damaged row removed, in one commit. When nothing
damaged counts any more, the shards concerned are rewritten without such rows. Killed at any instant, the gallery opens
at one of these commits, and the same call continues from there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..arrays import Ids, Pixels
from ..errors import CorruptGalleryError, FeatureError, ImageError
from ..extractors.registry import Extractor
from ..images.decode import decode, read_file
from ..images.sources import ImageFile, list_sources
from ..images.tiling import Box, Tiling, cut, image_key, place_of, tile_key
from ..ingest.image_reader import absolute
from ..store import key_table
from ..store.key_table import KeyTable
from ..store.shard_format import DAMAGED_NAMES
from ..store.snapshot import TEXTS_TOGETHER, Snapshot
from ..store.source_images import FILE_DIGEST, SourceImages, content_digest
from ..store.writer import GalleryWriter
from ..system.prefetch import batched
from .verify import foreign_shards


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
    if snapshot.manifest.rows and not _indexes_are_good(snapshot, mended):
        with suppress(CorruptGalleryError):  # a shard that is left as it is; verify reports it
            writer.write_index(snapshot.manifest.index_options)
            done.derived = True
    return done


def _indexes_are_good(snapshot: Snapshot, mended: bool) -> bool:
    """Return whether image index and key table are what was written and, where no shard is damaged, are theirs."""
    indexes = snapshot.indexes
    if not indexes.files_are_good():
        return False
    return not mended or not any(foreign_shards(snapshot, indexes.load_image_index(), indexes.load_key_table()))


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

    def unnamed(self) -> set[int]:
        """Return the ids of images whose names are damaged."""
        return {row_id for row_id, message in self.images.items() if message == DAMAGED_NAMES}

    def readable(self, snapshot: Snapshot) -> list[int]:
        """Return the ids of images whose names can be read, ascending."""
        unnamed = self.unnamed()
        return [
            row_id
            for row_id in snapshot.ids().tolist()
            if row_id not in unnamed and snapshot.shard_number(row_id) not in self.unreadable
        ]


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
    """Remove the images that are still damaged, and note what goes with the unreadable shards.

    An image in tiles goes with all of them: else `add` would take what is left for the image, and pass it over.
    """
    writer.commit()  # tiles that were re-extracted have ids from here on; the other ids stay
    snapshot, shards = writer.snapshot, writer.snapshot.manifest.shards
    unreadable = [shards[number] for number in sorted(damage.unreadable)]
    keys = [snapshot.shown(row_id) for row_id in damage.images]
    rows = set(damage.images)
    if snapshot.manifest.spec.tile is not None:
        torn = _torn_images(snapshot, damage)
        keys = list(dict.fromkeys([*map(image_key, keys), *torn]))
        rows.update(row_id for of_image in torn.values() for row_id in of_image)
    done.dropped = keys + [shard.file for shard in unreadable]
    done.dropped_images = len(rows) + sum(shard.images - shard.removed_count for shard in unreadable)
    writer.remove_rows(rows)
    damage.images = {}


def _torn_images(snapshot: Snapshot, damage: _Damage) -> dict[str, list[int]]:
    """Return the images that lose a tile: by their keys, the ids of their tiles whose names can be read.

    The key of a lost tile cannot be read any more, but the key table has its hash. So an image is torn if a tile that
    it may have, by those that are left of it, has the hash of a lost one.
    """
    tiling, readable = snapshot.manifest.spec.tiling, damage.readable(snapshot)
    keys = [key for rows in batched(readable, TEXTS_TOGETHER) for key in snapshot.keys(rows)]
    images: dict[str, list[int]] = {}
    places: dict[str, set[Box | None]] = {}
    for row_id, key in zip(readable, keys, strict=True):
        images.setdefault(image_key(key), []).append(row_id)
        places.setdefault(image_key(key), set()).add(place_of(key))
    torn = {image_key(key) for row_id, key in zip(readable, keys, strict=True) if row_id in damage.images}
    ids, key_of = snapshot.ids(), dict(zip(readable, keys, strict=True))
    lost = np.array([row_id not in key_of for row_id in ids.tolist()], np.bool_)
    if lost.any():
        known, hashes = _hashes_of(snapshot, ids[lost])
        before = {image_key(key_of[row_id]) for row_id in _before(ids, lost)}
        sizes = {
            (right - left, bottom - top) for own in places.values() for left, top, right, bottom in filter(None, own)
        }
        for image, own in places.items():
            among = None if image in before else sizes
            if any(key_table.key_hash(key.encode()) in hashes for key in _possible_tiles(image, own, tiling, among)):
                torn.add(image)
        # Without the hashes, what lies beside a lost tile may be of its image, and what has no first tile has lost it.
        lost[lost] = ~known
        torn.update(image_key(key_of[row_id]) for row_id in _before(ids, lost) if row_id in key_of)
        torn.update(image for image, own in places.items() if lost.any() and None not in own)
    return {image: images[image] for image in images if image in torn}


def _hashes_of(snapshot: Snapshot, ids: Ids) -> tuple[NDArray[np.bool_], set[int]]:
    """Return which ids the file of the key table has, (n,), and the hashes of their keys."""
    try:
        table = snapshot.indexes.load_key_table() if snapshot.manifest.keys is not None else KeyTable()
    except CorruptGalleryError:
        table = KeyTable()
    hashes, of = table.hashes()
    return np.isin(ids, of), set(hashes[np.isin(of, ids)].tolist())


def _before(ids: Ids, lost: NDArray[np.bool_]) -> list[int]:
    """Return the ids before each run of lost ones."""
    found: list[int] = ids[:-1][lost[1:] & ~lost[:-1]].tolist()
    return found


def _possible_tiles(
    image: str, places: set[Box | None], tiling: Tiling, sizes: Collection[tuple[int, int]] | None
) -> Iterator[str]:
    """Yield the keys of tiles that an image may have besides those at some places.

    Args:
        image: its key.
        places: of its other tiles.
        tiling: that cut it.
        sizes: (width, height) of its tiles, one of these, if no place says so; None: any that the tiling makes.
    """
    assert tiling.tile is not None
    height, width = tiling.tile
    boxes = [place for place in places if place is not None]
    if boxes:
        sizes = {(right - left, bottom - top) for left, top, right, bottom in boxes}
    elif sizes is None:
        sizes = {(width, h) for h in range(1, height + 1)} | {(w, height) for w in range(1, width + 1)}
    else:
        sizes = {*sizes, (width, height)}
    lefts, tops = {0, *(box[0] for box in boxes)}, {0, *(box[1] for box in boxes)}
    if None not in places:
        yield image
    for w, h in sizes:
        # No two tiles beside each other are further apart than a tile. Its first row and column have every place.
        across = [(x, 0) for x in range(1, max(lefts) + width + 1)] if w == width else []
        down = [(0, y) for y in range(1, max(tops) + height + 1)] if h == height else []
        for x, y in {*across, *down, *((x, y) for x in lefts for y in tops)} - {(0, 0)}:
            if (x, y, x + w, y + h) not in places:
                yield tile_key(image, (x, y, x + w, y + h))


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
    unnamed = damage.unnamed()
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
        self._spec = snapshot.manifest.spec
        self._taken = set(
            snapshot.keys([row_id for row_id in damage.readable(snapshot) if row_id not in damage.images])
        )
        self._files = [
            file
            for file in (list_sources(folders) if folders else [])
            if file.key not in self._taken or self._spec.tile is not None
        ]
        self._digests: dict[Path, str | None] = {}
        self._tiles: dict[Path, list[str]] = {}

    def named_as(self, row_id: int) -> tuple[bytes, _Names] | None:
        """Return the content and the names of the file that agrees with what is left of an image's names."""
        names = self._snapshot.rows.names(row_id)
        key, digest, *kept = names.all_shown(0)
        files = self._files
        if self._spec.tile is not None:  # each is decoded to learn its tiles: the likely ones first
            files = sorted(files, key=lambda file: file.key != image_key(key) and self._digest(file.path) != digest)
        candidates: list[tuple[Path, str, ImageFile | None]] = [(file.path, absolute(file), file) for file in files]
        candidates += [(Path(path), path, None) for path in kept if Path(path).is_file()]
        for path, place, file in candidates:
            content = self._digest(path)
            for name in self._keys(file) if file is not None else [key]:
                if content is None:  # another candidate may be the image's file
                    break
                found = _Names(name, content, place if kept else None)
                # Either the checksum is good and agrees, or the checksum itself is damaged, or the path is.
                if names.were(0, found.key, found.digest, found.path) or (found.key, found.digest) == (key, digest):
                    return read_file(path), found
        return None

    def _digest(self, path: Path) -> str | None:
        """Return the digest of a file; None: it cannot be read."""
        if path not in self._digests:
            self._digests[path] = None
            with suppress(ImageError):
                self._digests[path] = content_digest(read_file(path))
        return self._digests[path]

    def _keys(self, file: ImageFile) -> list[str]:
        """Return the keys that an image file has in the gallery, of its tiles if there are any, and no good row has."""
        if self._spec.tile is None:
            return [file.key]
        if file.path not in self._tiles:
            self._tiles[file.path] = []
            with suppress(ImageError, FeatureError):
                size = decode(read_file(file.path), str(file.path), self._spec.bits).shape[:2]
                self._tiles[file.path] = [
                    key for key in self._spec.tiling.keys(file.key, size) if key not in self._taken
                ]
        return self._tiles[file.path]
