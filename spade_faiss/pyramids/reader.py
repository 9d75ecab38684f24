"""The pyramid levels of neighbours, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..arrays import Array
from ..extractors.spec import ExtractorSpec
from ..store.snapshot import Snapshot

if TYPE_CHECKING:
    pass

Identity = tuple[str, int]  # of an image in every generation of a gallery: its shard's file and row, never used again


class PyramidSource(Protocol):
    """Where the pyramid levels of one generation's images come from. Threads may share one."""

    @property
    def spec(self) -> ExtractorSpec:
        """Shapes and dtype of the levels."""
        ...

    def identity(self, row_id: int) -> Identity:
        """Return what names an image in every generation of its gallery: the file of its shard, and the row in it."""
        ...

    def read_into(self, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        """Write the levels of images.

        Args:
            ids: of n images.
            out: for each image its levels, n times [(c, h, w), ...], contiguous, of the spec's shapes and dtype.
        """
        ...


class StoredPyramids:
    """The levels that a gallery's shards hold."""

    def __init__(self, generation: Snapshot, verify: bool = True) -> None:
        """Read from a generation; without `verify`, whatever the disk gives is believed."""
        self._generation = generation
        self._verify = verify

    @property
    def spec(self) -> ExtractorSpec:
        """See PyramidSource."""
        return self._generation.manifest.spec

    def identity(self, row_id: int) -> Identity:
        """See PyramidSource."""
        return self._generation.identity(row_id)

    def read_into(self, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        """See PyramidSource.

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written.
        """
        self._generation.read_into(ids, out, self._verify)
