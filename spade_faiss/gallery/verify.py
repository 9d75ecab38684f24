"""Everything in a generation's files, read and compared with what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptGalleryError
from ..images.sources import ImageFile
from ..pyramids.recomputed import missing_sources
from ..store.snapshot import Snapshot


@dataclass(frozen=True)
class Problem:
    """Something that verify found: where, and what."""

    file: str
    what: str
    key: str | None = None  # of the image, where it is about one


def problems_of(generation: Snapshot, files: bool, normal: Sequence[str | Path | ImageFile]) -> list[Problem]:
    """Read everything; see Gallery.verify."""
    problems, manifest = [], generation.manifest
    for number, entry in enumerate(manifest.shards):
        try:
            found = list(generation.shard(number).problems())
        except CorruptGalleryError as error:
            problems.append(Problem(entry.file, str(error)))
        else:
            problems += [Problem(entry.file, what, key) for key, what in found]
    if files and not problems:  # a damaged shard does not say reliably where a file is
        problems += [
            Problem(str(generation.source(row_id)), str(error), *generation.keys([row_id]))
            for row_id, error in missing_sources(generation, normal)
        ]
    indexes = generation.indexes
    for derived, load in ((manifest.index, indexes.load_image_index), (manifest.keys, indexes.load_key_table)):
        if derived is not None:
            try:
                load()
            except CorruptGalleryError as error:
                problems.append(Problem(derived.file, str(error)))
    return problems
