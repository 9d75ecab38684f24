"""Reads the pyramid levels of neighbours: the protocol of all readers, and the one that reads shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..arrays import Array
from ..extractors.spec import ExtractorSpec
from ..store.snapshot import Snapshot

Identity = tuple[str, int]  # of an image in every snapshot: its shard by GalleryFiles.identity, and its row


class PyramidSource(Protocol):
    """Reads the pyramid levels of a snapshot's images. Threads may share one."""

    @property
    def spec(self) -> ExtractorSpec:
        """Shapes and dtype of the levels."""
        ...

    def identity(self, row_id: int) -> Identity:
        """Return what identifies an image in every snapshot; see Snapshot.identity."""
        ...

    def read_into(self, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        """Write the levels of images.

        Args:
            ids: n ids.
            out: arrays to write to, [(c, h, w), ...] for each image, contiguous, of the spec's shapes and dtype.
        """
        ...


class StoredPyramids:
    """Reads levels from a gallery's shards."""

    def __init__(self, snapshot: Snapshot, verify: bool = True) -> None:
        """Read from a snapshot; with `verify`, compare every level with its checksum."""
        self._snapshot = snapshot
        self._verify = verify

    @property
    def spec(self) -> ExtractorSpec:
        """See PyramidSource."""
        return self._snapshot.manifest.spec

    def identity(self, row_id: int) -> Identity:
        """See PyramidSource."""
        return self._snapshot.identity(row_id)

    def read_into(self, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        """See PyramidSource.

        Raises:
            CorruptGalleryError: levels cannot be read or, with `verify`, are not what was written.
        """
        self._snapshot.read_into(ids, out, self._verify)
