"""Neighbours of one level that other queries may have had, too: what these have prepared is not prepared again."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from .bounds_gallery import BoundsGallery, fewer_and_fewer, is_exact
from .bounds_plan import Projection
from .bounds_prepared import Prepared
from .bounds_sources import Floats
from .kept import KeptLevel, Way


class SharedGallery(BoundsGallery):
    """Neighbours of one level that other queries may have had, too; of float16 or float32."""

    def __init__(self, level: Array, query: Array, kept: KeptLevel) -> None:
        """Take a level (K, c, h, w) of the neighbours; `query` (c, ...) is one that is compared with them."""
        self._own = kept
        self._way = kept.store.way(kept.level)
        self._held: dict[int, Prepared] = {}  # by neighbour: what lies at the addresses, whoever lets go of it
        super().__init__([level], [query], frame=self._way.frame if self._way else None, distinct=True)
        if self._way is not None:
            self.projections = [self._way.projection]

    @classmethod
    def serves(cls, level: Array, query: Array, kept: KeptLevel) -> bool:
        """Return whether neighbours of these can be shared: without a shift, which is the query's, nothing is lost."""
        size = 2 * 4 * level.size  # cells, and about as much again of panels
        return is_exact(level, query) and size <= kept.store.limit

    def settle(self) -> None:
        """See BoundsGallery: one projection serves all neighbours, as the same image is not always as near."""
        if self.projections[0] is self.plain:  # nothing could be found out
            return
        self.projections = self.projections[:1]
        self._way = Way(self.frame, self.projections[0])
        self._own.store.choose(self._own.level, self._way)

    def chunks(self, together: int, threads: int, first: int) -> list[range]:
        """See BoundsGallery. Of what is prepared, more at a time take less; the last are few: no thread waits long."""
        if self._way is None or None in self._own.store.take(self._own.level, self._own.names, self._way):
            return super().chunks(together, threads, first)
        return fewer_and_fewer(range(self.k), threads)

    def prepared(self, some: range, projection: Projection, room: Floats, keep: bool = False) -> Prepared:
        """See BoundsGallery."""
        if self._way is None or projection is not self._way.projection:
            return super().prepared(some, projection, room, keep)
        store, level, way = self._own.store, self._own.level, self._way
        names = self._own.names[some.start : some.stop]
        found: list[Any] = store.take(level, names, way)
        for at, name in enumerate(names):
            neighbour = some.start + at
            if found[at] is None:
                found[at] = self._prepare(range(neighbour, neighbour + 1), projection, self.room(1))
                store.keep(level, name, way, found[at])
            self._held[neighbour] = found[at]
        cells_at, panels_at, largest = (
            np.concatenate([getattr(one, part) for one in found]) for part in ("cells_at", "panels_at", "largest")
        )
        self.kept_at[some.start : some.stop] = cells_at
        return Prepared(projection, found[0].cells, cells_at, panels_at, largest, tuple(found))

    def is_striped(self, some: range) -> bool:
        """See BoundsGallery: they will be kept."""
        return False

    def measured(self, number: int) -> None:
        """See BoundsGallery."""
        if self._way is not None:
            self._own.store.tell(self._own.level, self._way, number / (self.k * self.n**2))
