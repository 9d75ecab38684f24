"""Neighbours of one level that other queries may have had, too: what these have prepared is not prepared again."""

from __future__ import annotations

from typing import Any

from ...arrays import Array
from ...system.threads import in_single_threads
from .boxes import with_axes
from .gallery import BoundsGallery, is_exact
from .kept import KeptLevel, Way
from .prepared import Prepared


class SharedGallery(BoundsGallery):
    """Neighbours of one level that other queries may have had, too; of float16 or float32."""

    def __init__(self, level: Array, query: Array, kept: KeptLevel) -> None:
        """Take a level (K, c, h, w) of the neighbours; `query` (c, ...) is one that is compared with them."""
        self._own = kept
        self._way = kept.store.way(kept.level)
        self._held: list[tuple[range, Prepared]] = []  # once they are prepared, whoever lets go of them
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
        self.projections = [with_axes(self.projections[0], self.directions)]
        self._way = Way(self.frame, self.projections[0])
        self._own.store.choose(self._own.level, self._way)

    def ready(self, threads: int) -> list[tuple[range, Prepared]]:
        """See BoundsGallery; what is not prepared yet is."""
        if self._way is None or self.projections[0] is not self._way.projection:
            return []
        if not self._held:
            store, level, way = self._own.store, self._own.level, self._way
            found: list[Any] = store.take(level, self._own.names, way)

            def prepare(at: int) -> None:
                found[at] = self._prepare(range(at, at + 1), way.projection, self.room(1), sort=True)
                store.keep(level, self._own.names[at], way, found[at])

            missing = [at for at, one in enumerate(found) if one is None]
            in_single_threads(threads, prepare, missing)
            self._held = [(range(self.k), Prepared.joined(found))]
            self.kept_at[:] = self._held[0][1].cells_at
        return self._held

    def is_striped(self, some: range) -> bool:
        """See BoundsGallery: they will be kept."""
        return False

    def measured(self, number: int) -> None:
        """See BoundsGallery."""
        if self._way is not None:
            self._own.store.tell(self._own.level, self._way, number / (self.k * self.n**2))
