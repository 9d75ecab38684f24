"""What is kept of normal images between queries; all runs of a detector share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays import Ids
from ..options import SearchOptions
from ..patch_search.bounds.kept import KeptLevel, KeptNeighbours
from ..pyramids.cache import LevelCache, PyramidCache
from ..pyramids.device_cache import DeviceCache, device_cache
from ..pyramids.reader import PyramidSource

PREPARED = 2  # a part of the bytes of cached levels: what searches have prepared of neighbours may take as much on top


@dataclass(frozen=True)
class Caches:
    """Pyramid levels that were needed lately, in memory and on a GPU, and what searches on the CPU made of them."""

    host: PyramidCache
    device: DeviceCache | None
    prepared: KeptNeighbours

    @classmethod
    def of(cls, search: SearchOptions) -> Caches:
        """Return empty ones of the options' sizes."""
        host = PyramidCache(search.cache_bytes)
        return cls(host, device_cache(search, host), KeptNeighbours(search.cache_bytes // PREPARED))

    def for_neighbours(self, pyramids: PyramidSource, n: int) -> LevelCache[Any]:
        """Return the cache for n neighbours: the GPU's if they fit its bound, as they are copied there."""
        return self.device if self.device is not None and self.device.fits(pyramids, n) else self.host

    def prepared_of(self, pyramids: PyramidSource, ids: Sequence[int] | Ids) -> list[KeptLevel]:
        """Return what searches have prepared of some images, by level."""
        names = [pyramids.identity(int(row_id)) for row_id in ids]
        return self.prepared.levels(names, len(pyramids.spec.level_shapes))
