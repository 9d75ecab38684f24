"""Re-extracts pyramid levels from the image files, for galleries that do not store levels.

A file counts only if its SHA-256 is that of the file that the gallery was built from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..arrays import Array, Pixels
from ..errors import ImageError, SourceError
from ..extractors.features import require_rows
from ..extractors.registry import Extractor
from ..extractors.spec import ExtractorSpec
from ..images.reading import decoding_gate, view_of
from ..images.sources import ImageFile
from ..store.snapshot import Snapshot
from ..store.source_images import SourceImages
from ..system.prefetch import batched, read_ahead
from .reader import Identity, PyramidSource, StoredPyramids

READERS = 8  # maximum number of threads that read and decode files while the network is busy
ADVICE = (
    "put it back, or say which folder it is in (normal=FOLDER); or add the present file (replace=True), "
    "or remove the key"
)


Places = str | Path | ImageFile | Sequence[str | Path | ImageFile]  # of image files: folders, or the files


def places(given: Places) -> tuple[str | Path | ImageFile, ...]:
    """Return places of image files, of which one may be given by itself."""
    return (given,) if isinstance(given, (str, Path, ImageFile)) else tuple(given)


class RecomputedPyramids:
    """Re-extracts the levels of a snapshot's images from their files. Threads may share one."""

    def __init__(self, snapshot: Snapshot, extractor: Extractor, source_images: SourceImages) -> None:
        self._snapshot = snapshot
        self._extractor = extractor
        self._source_images = source_images
        self._gate = decoding_gate()

    @property
    def spec(self) -> ExtractorSpec:
        """See PyramidSource."""
        return self._snapshot.manifest.spec

    def identity(self, row_id: int) -> Identity:
        """See PyramidSource."""
        return self._snapshot.identity(row_id)

    def read_into(self, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        """See PyramidSource. Files are read ahead of the network, which gets batches of its usual size.

        Raises:
            SourceError: an image file is missing, has changed or cannot be read.
        """
        size = self._extractor.batch_size
        views = read_ahead(ids, self._view, min(READERS, os.cpu_count() or 1), 2 * size)
        slots = iter(out)
        for batch in batched(views, size):
            features = require_rows(self._extractor.extract(batch), len(batch), self.spec.name)
            levels = self.spec.cast(features).levels  # in the dtype that a gallery would store
            for row, slot in zip(range(len(batch)), slots, strict=False):
                for target, level in zip(slot, levels, strict=True):
                    target[...] = level[row]

    def _view(self, row_id: int) -> Pixels:
        try:
            content, path = self._source_images.find(row_id)
            viewed = view_of(content, str(path), self.spec.tiling, self.spec.bits, self._gate)
            [key] = self._snapshot.keys([row_id])
            return viewed.views[self.spec.tiling.number(key, viewed.size)]
        except ImageError as error:
            raise _source_error(self._snapshot, row_id, error) from error


def pyramids_of(snapshot: Snapshot, extractor: Extractor, normal: Places = (), verify: bool = True) -> PyramidSource:
    """Return the reader of a snapshot's levels: from its shards, or from the image files.

    Args:
        snapshot: of the gallery.
        extractor: the one that made the gallery; used only to re-extract levels.
        normal: folders that the gallery was built from, or image files; looked at after the paths that it keeps.
        verify: compare levels in shards with their checksums. Image files are always compared.
    """
    if snapshot.manifest.schema.has_levels:
        return StoredPyramids(snapshot, verify)
    return RecomputedPyramids(snapshot, extractor, _source_images(snapshot, normal))


def missing_sources(snapshot: Snapshot, normal: Places = ()) -> list[tuple[int, SourceError]]:
    """Return the ids of images whose files are missing or have changed, each with its error.

    A gallery that stores levels needs no files: nothing is missing.
    """
    if snapshot.manifest.schema.has_levels:
        return []
    source_images = _source_images(snapshot, normal)

    def check(row_id: int) -> SourceError | None:
        try:
            source_images.find(row_id)
        except ImageError as error:
            return _source_error(snapshot, row_id, error)
        return None

    ids = snapshot.ids().tolist()
    found = zip(ids, read_ahead(ids, check, min(READERS, os.cpu_count() or 1)), strict=True)
    return [(row_id, error) for row_id, error in found if error is not None]


def _source_images(snapshot: Snapshot, normal: Places) -> SourceImages:
    normal = places(normal)
    folders = [Path(place) for place in normal if not isinstance(place, ImageFile)]
    return SourceImages(snapshot, folders, [place for place in normal if isinstance(place, ImageFile)])


def _source_error(snapshot: Snapshot, row_id: int, error: ImageError) -> SourceError:
    [key], path = snapshot.keys([row_id]), snapshot.source(row_id)
    return SourceError(
        f"{path}: expected the image {key!r}, from which {snapshot.folder} recomputes patches, found: {error}; {ADVICE}"
    )
