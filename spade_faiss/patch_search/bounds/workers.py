"""A query's side of the search by bounds, and what its threads do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...arrays import Array
from ..levels import check_neighbours
from . import kernels
from .boxes import NO_CORNERS
from .gallery import BoundsGallery
from .panels import squares_of
from .plan import MULTIPLY, Projection
from .prepared import Prepared, packed_query
from .products_tiles import LINE, NEAR_STRIDE, TILE_ROWS, lined_up
from .simd import LOOK, ROWS, WIDTH
from .sources import Floats, Ints
from .stripes import Striper, Stripes
from .within import FEW_STRIDE, lists_of

CROWD = 0.5  # times what all products of all channels take: more time for what is left, and directions are given up


@dataclass(frozen=True)
class Search:
    """The query's side."""

    gallery: BoundsGallery
    distinct: bool
    query: Floats  # (q, c) patches, shifted
    norms: NDArray[np.float64]  # (q,) about the centre, at scale
    levels: Sequence[Array]  # of all patches, where they are those of one grid
    coordinates: dict[int, torch.Tensor]  # (width, q) of all patches, by the identity of projections
    operands: dict[int, Floats] = field(default_factory=dict)  # likewise
    corners: Floats = field(default_factory=lambda: NO_CORNERS)  # of blocks, see boxes.corners_of; none: not in order

    @classmethod
    def of(cls, gallery: BoundsGallery, query: Sequence[Array], distinct: bool, at: Ints | None = None) -> Search:
        """Prepare a query, or those of its patches that `at` numbers."""
        known: dict[int, torch.Tensor] = {}
        if gallery.is_mixed or at is not None:
            query, patches = [], gallery.patches(query, at)
        else:
            first = gallery.projection(0)
            patches, known[id(first)] = gallery.loaded(query, first, at is None)
        sq_norms = np.empty(len(patches))
        squares_of(patches, np.float32(gallery.scale), gallery.centre, sq_norms)
        return cls(gallery, distinct, patches, np.sqrt(sq_norms), query, known)

    @cached_property
    def own(self) -> torch.Tensor:
        """The patches (c, q) about the centre, at scale."""
        return torch.from_numpy(self.query).T * self.gallery.scale - torch.from_numpy(self.gallery.centre)[:, None]

    @cached_property
    def longest(self) -> float:
        """The largest norm."""
        return float(self.norms.max())

    def figures(self, projection: Projection) -> tuple[float, float, float, float]:
        """Return scale, doubts and the query's largest norm as `compare` takes them."""
        return self.gallery.scale**2, projection.doubt, projection.coarseness, self.longest

    def operand(self, projection: Projection, alone: bool = False) -> Floats:
        """Return what the neighbours' panels are multiplied by, (blocks, words, ROWS).

        Args:
            projection: of the panels.
            alone: whether no other thread works for this search.
        """
        if id(projection) not in self.operands:
            self.operands[id(projection)] = packed_query(projection, self.located(projection, alone), self.longest)
        return self.operands[id(projection)]

    def located(self, projection: Projection, alone: bool = False) -> torch.Tensor:
        """Return the coordinates (width, q) of all patches; see operand."""
        found = self.coordinates.get(id(projection))
        if found is None and self.levels:
            _, found = self.gallery.loaded(self.levels, projection, alone)
        elif found is None:
            sq_norms = torch.from_numpy(np.square(self.norms).astype(np.float32))[None, None]
            along = projection.along(self.own[None], slice(None))
            [found] = projection.joined([along], sq_norms)
        self.coordinates[id(projection)] = found
        return found

    def in_order(self, order: Ints, projection: Projection, corners: Floats) -> Search:
        """Return the search for the same patches in another order (q,), with the corners of their blocks."""
        known = {id(projection): self.located(projection)[:, torch.from_numpy(order)]}
        return Search(self.gallery, self.distinct, self.query[order], self.norms[order], (), known, corners=corners)


class Worker:
    """One thread's share of the neighbours."""

    def __init__(self, search: Search, kappa: int, reach: Floats, workers: int = 1, guess: bool = False) -> None:
        """Begin with nothing found; `reach` (q,) bounds the kappa-th nearest, and all workers lower it.

        A guess only measures the patches of each neighbour whose bounds are least.
        """
        q, n = len(search.query), search.gallery.n
        self.search, self.reach, self.is_crowded, self.guess = search, reach, False, guess
        self.measured = 0
        self.most = CROWD * q * n * search.gallery.k * search.gallery.depth * MULTIPLY / workers
        self.best, self.best_at = np.full((q, kappa), np.inf, np.float32), np.full((q, kappa), -1, np.int64)
        self.room: Floats | None = None
        self.striper = Striper(search.gallery)
        self.scratch = scratch_of(search.gallery, q, kappa)

    def run(self, work: Iterator[range]) -> None:
        """Compare neighbours, ascending, until there are no more."""
        with np.errstate(over="ignore", invalid="ignore"):
            for some in work:
                self.measured += self.compare(some)
                # More is left than the sample has shown. The nearest neighbours come first, and most is left there.
                self.is_crowded = self.measured * self.search.gallery.measure_cost > self.most

    def compare(self, some: range) -> int:
        """Compare some neighbours; returns the number of patches that were measured."""
        search, gallery = self.search, self.search.gallery
        wanted = gallery.plain if self.is_crowded else gallery.projection(some.start)
        stripes: Stripes | None = None
        if not self.guess and gallery.is_striped(some):
            theirs, stripes = Prepared.none(wanted, len(some)), self.striper.stripes(some, wanted)
        else:
            if self.room is None:
                self.room = gallery.room(len(some))  # the first are the most
            theirs = gallery.prepared(some, wanted, self.room, self.guess)
        projection = theirs.projection
        count, is_finite = kernels.compare(
            search.query, search.operand(projection), search.norms, theirs.cells, theirs.cells_at, gallery.mix,
            gallery.parts, theirs.panels_at, stripes, np.int64(projection.words), theirs.largest,
            (theirs.sorted_at, search.corners), some.start * gallery.n, search.figures(projection),
            (gallery.n, gallery.length, search.distinct, projection.kind, self.guess),
            self.best, self.best_at, self.reach, self.scratch,
        )  # fmt: skip
        if gallery.scan and not is_finite:
            check_neighbours([level[some.start : some.stop] for level in gallery.levels])
        return int(count)


def scratch_of(gallery: BoundsGallery, q: int, kappa: int) -> tuple[Any, ...]:
    """Return memory for `compare` with q patches of a query."""
    n, made, rows = gallery.n, gallery.n if gallery.is_mixed else 0, max(TILE_ROWS, ROWS)
    small = (
        np.empty(kappa, np.float32), np.empty(kappa, np.int64),
        np.empty((made, gallery.depth), np.float32), np.full(made, -1, np.int64),
    )  # fmt: skip
    return (
        lined_up((rows, max(-(-n // LOOK) * LOOK + LINE, NEAR_STRIDE, FEW_STRIDE)), np.inf), lined_up((rows, WIDTH)),
        np.empty(q, np.float64), np.empty(q, np.int64), lists_of(q), small,
    )  # fmt: skip
