"""The pyramid levels of a gallery that does not store them: extracted anew from the image files, when they are needed.

A file counts only when its content is, by SHA-256, what the gallery was built from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..arrays import Array, Pixels
from ..errors import ImageError, SourceError
from ..extractors.registry import Extractor
from ..extractors.spec import ExtractorSpec
from ..images.decode import decode
from ..images.sources import ImageFile
from ..store.snapshot import Snapshot
from ..store.source_images import SourceImages
from ..system.prefetch import batched, read_ahead
from .reader import Identity, PyramidSource, StoredPyramids

READERS = 8  # threads that read and decode files while the network is busy, at most
ADVICE = (
    "put it back, or say which folder it is in (--normal DIR); or take what is there now (`add --replace`), "
    "or `remove` the key"
)


class RecomputedPyramids:
    """The levels of one generation's images as their files give them again. Threads may share one."""

    def __init__(self, generation: Snapshot, extractor: Extractor, originals: SourceImages) -> None:
        self._generation = generation
        self._extractor = extractor
        self._originals = originals

    @property
    def spec(self) -> ExtractorSpec:
        """See PyramidSource."""
        return self._generation.manifest.spec

    def identity(self, row_id: int) -> Identity:
        """See PyramidSource."""
        return self._generation.identity(row_id)

    def read_into(self, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        """See PyramidSource; files are read ahead of the network, which gets them in batches of its own size.

        Raises:
            SourceError: an image file is gone, has changed or cannot be read.
        """
        size = self._extractor.batch_size
        views = read_ahead(ids, self._view, min(READERS, os.cpu_count() or 1), 2 * size)
        slots = iter(out)
        for batch in batched(views, size):
            levels = self.spec.cast(self._extractor.extract(batch)).levels  # as they would have been stored
            for row, slot in zip(range(len(batch)), slots, strict=False):
                for target, level in zip(slot, levels, strict=True):
                    target[...] = level[row]

    def _view(self, row_id: int) -> Pixels:
        try:
            content, path = self._originals.find(row_id)
            return self.spec.view.apply(decode(content, str(path)))
        except ImageError as error:
            raise _source_error(self._generation, row_id, error) from error


def pyramids_of(
    generation: Snapshot, extractor: Extractor, normal: Sequence[str | Path | ImageFile] = (), verify: bool = True
) -> PyramidSource:
    """Return where a generation's levels come from: its shards, or the image files.

    Args:
        generation: of the gallery.
        extractor: that made it; only asked where levels are recomputed.
        normal: where the files may be, besides the paths that the gallery keeps: folders it was built from, or files.
        verify: compare what shards give with its checksum. Image files are always compared.
    """
    if generation.manifest.patches == "stored":
        return StoredPyramids(generation, verify)
    return RecomputedPyramids(generation, extractor, _originals(generation, normal))


def missing_sources(
    generation: Snapshot, normal: Sequence[str | Path | ImageFile] = ()
) -> list[tuple[int, SourceError]]:
    """Check the image file of every image; returns the ids of those that are gone or have changed, with what is wrong.

    Nothing is missing where the patches are stored.
    """
    if generation.manifest.patches == "stored":
        return []
    originals = _originals(generation, normal)

    def check(row_id: int) -> SourceError | None:
        try:
            originals.find(row_id)
        except ImageError as error:
            return _source_error(generation, row_id, error)
        return None

    ids = generation.ids().tolist()
    found = zip(ids, read_ahead(ids, check, min(READERS, os.cpu_count() or 1)), strict=True)
    return [(row_id, error) for row_id, error in found if error is not None]


def _originals(generation: Snapshot, normal: Sequence[str | Path | ImageFile]) -> SourceImages:
    folders = [Path(place) for place in normal if not isinstance(place, ImageFile)]
    return SourceImages(generation, folders, [place for place in normal if isinstance(place, ImageFile)])


def _source_error(generation: Snapshot, row_id: int, error: ImageError) -> SourceError:
    [key], path = generation.keys([row_id]), generation.source(row_id)
    return SourceError(
        f"{path}: expected the image {key!r}, from which {generation.folder} recomputes patches, "
        f"found: {error}; {ADVICE}"
    )
