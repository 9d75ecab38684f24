"""Exact search by bounds: a few directions rule most patches out, and what is left is measured.

Let P be m orthonormal directions. Then |q - x|^2 >= |Pq - Px|^2 + (|q - P'Pq| - |x - P'Px|)^2, a squared distance of
m + 1 numbers in place of all channels. If the directions hold most of the variance, few patches are left whose bound is
under the nearest found so far: these are measured as sums of squares. What rounding can do to a bound is counted into
it, so nothing is lost. Where directions do not pay, the bound is the product of all channels.

Upsampling is linear: of several levels, each is projected at its own resolution, and the coordinates are upsampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import FeatureError
from ..system.threads import in_one_thread, torch_threads
from . import bounds_kernels as kernels
from .bounds_choices import CHOICES
from .bounds_gallery import BoundsGallery, spread
from .bounds_panels import TILES, squares_of
from .bounds_plan import MULTIPLY, Projection, fitted, likely_reach, narrow, provisional
from .bounds_prepared import Prepared, packed_query
from .bounds_simd import LOOK, ROWS, WIDTH
from .bounds_sources import Floats, Ints
from .bounds_stripes import Striper, whole
from .bounds_tiles import LINE, TILE_ROWS, lined_up
from .levels import check_neighbours
from .pyramid_kernels import keep_nearest
from .sharing import share_out

CHUNK_BYTES = 2**19  # neighbours' patches loaded at a time
FIRST = 4  # neighbours searched before directions are chosen; if matches are distinct, kappa more
GUESSES = 2  # neighbours of each thread whose likeliest patches are measured first: few are left then
WORTH = 5e7  # nanoseconds of products of all channels that are worth the choice of directions
LOAD = 12.0  # nanoseconds that a value of a neighbour takes to be prepared
CROWD = 0.5  # times what all products of all channels take: more time for what is left, and directions are given up
ASKED = 64  # patches of the query that try directions
WHOLE = whole()  # no stripes: the neighbours are prepared


def search_bounds(query: Array, gallery: Array, kappa: int, distinct: bool = False) -> tuple[Floats, Ints]:
    """Search one level of all neighbours on the CPU, with torch's number of threads.

    Args:
        query: (c, q) patches.
        gallery: (K, c, h, w) level of the neighbours.
        kappa: number of nearest patches; at most K if they are distinct.
        distinct: whether these lie in as many neighbours, each the nearest of its neighbour.

    Returns:
        sq_distances (q, kappa), ascending, and matches (q, kappa): positions counted through neighbour, row, column.
        Equal distances are in the order of positions.

    Raises:
        FeatureError: a squared distance does not fit float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        prepared = in_one_thread(BoundsGallery, [gallery], [query], 0, None, distinct)
    return search_prepared(prepared, [query], kappa, distinct)


class TooMuchLeftError(Exception):
    """Bounds leave so much to be measured that another engine is faster."""


def search_levels_by_bounds(
    query: list[Array], gallery: list[Array], kappa: int, budget: float = np.inf, scan: bool = False
) -> tuple[Floats, Ints]:
    """Search all levels together on the CPU, with torch's number of threads; see search_patches and search_prepared.

    Args:
        query: levels.
        gallery: levels.
        kappa: number of nearest patches.
        budget: see search_prepared.
        scan: whether values of the neighbours may not be finite.

    Returns:
        sq_distances (h * w, kappa) and matches (h * w, kappa): positions counted through neighbour, row, column.
    """
    if np.isfinite(budget) and CHOICES.take(_kind([level.shape for level in gallery], query, kappa, False, budget)):
        raise TooMuchLeftError
    with np.errstate(over="ignore", invalid="ignore"):
        prepared = in_one_thread(BoundsGallery, gallery, query, 0, None, False, torch_threads())
    prepared.scan = scan
    return search_prepared(prepared, query, kappa, budget=budget)


def search_prepared(
    gallery: BoundsGallery, query: Sequence[Array], kappa: int, distinct: bool = False, reach: Floats | None = None,
    budget: float = np.inf,
) -> tuple[Floats, Ints]:  # fmt: skip
    """Search as search_bounds does; a second search of a gallery finds what the first has prepared.

    Args:
        gallery: the neighbours.
        query: levels [(c, h, w), ...] of their grids; if they have one, (c, q) patches will do.
        kappa: as for search_bounds.
        distinct: as for search_bounds.
        reach: (q,) what no kappa-th nearest squared distance is above, if that is known.
        budget: nanoseconds of one core, in the unit of bounds_plan, that the search may take.

    Raises:
        TooMuchLeftError: it will take more.
        FeatureError: a squared distance does not fit float32, or a value of the neighbours is not finite.
    """
    k, threads = gallery.k, torch_threads()
    with np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances, and is refused there
        together = max(1, min(CHUNK_BYTES // (4 * gallery.n * gallery.depth), -(-k // threads)))
        tried, guessed = -(-(FIRST + (kappa if distinct else 0)) // together), GUESSES * min(threads, k)
        chunks = gallery.chunks(together, threads, max(tried, guessed))
        if not gallery.projections:
            in_one_thread(_take_choice, gallery, query, distinct, chunks[:tried], kappa, budget)
            gallery.settle()
        search = in_one_thread(_Search.of, gallery, query, distinct)
        if not np.isfinite(search.longest):
            gallery.projections = [gallery.plain]
        reach = np.full(len(search.query), np.inf, np.float32) if reach is None else reach
        in_one_thread(search.operand, gallery.projection(0))  # else each thread would make it
        number = min(threads, k)
        workers = [_Worker(search, kappa, reach, number) for _ in range(number)]
        if not distinct and gallery.projection(0).directions is not None:
            guesses = [_Worker(search, kappa, reach, guess=True) for _ in range(number)]
            share_out(chunks[:guessed], guesses)
        share_out(chunks, workers)
        gallery.measured(sum(worker.measured for worker in workers))
    best, best_at = workers[0].best, workers[0].best_at
    for other in workers[1:]:
        lanes, entries = np.nonzero(other.best_at >= 0)
        keep_nearest(lanes, other.best_at[lanes, entries], other.best[lanes, entries], best, best_at)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    order = np.lexsort((best_at, best), axis=1)
    return np.take_along_axis(best, order, 1), np.take_along_axis(best_at, order, 1)


@dataclass(frozen=True)
class _Search:
    """The query's side."""

    gallery: BoundsGallery
    distinct: bool
    query: Floats  # (q, c) patches, shifted
    sq_norms: NDArray[np.float64]  # (q,) squared norms about the centre, at scale
    levels: Sequence[Array]  # of all patches, where they are those of one grid
    coordinates: dict[int, torch.Tensor]  # (width, q) of all patches, by the identity of projections
    operands: dict[int, Floats] = field(default_factory=dict)  # likewise

    @classmethod
    def of(cls, gallery: BoundsGallery, query: Sequence[Array], distinct: bool, at: Ints | None = None) -> _Search:
        """Prepare a query, or those of its patches that `at` numbers."""
        known: dict[int, torch.Tensor] = {}
        if gallery.is_mixed or at is not None:
            query, patches = [], gallery.patches(query, at)
        else:
            first = gallery.projection(0)
            patches, known[id(first)] = gallery.loaded(query, first)
        sq_norms = np.empty(len(patches))
        squares_of(patches, np.float32(gallery.scale), gallery.centre, sq_norms)
        return cls(gallery, distinct, patches, sq_norms, query, known)

    @cached_property
    def own(self) -> torch.Tensor:
        """The patches (c, q) about the centre, at scale."""
        return torch.from_numpy(self.query).T * self.gallery.scale - torch.from_numpy(self.gallery.centre)[:, None]

    @property
    def longest(self) -> float:
        """The largest norm."""
        return float(np.sqrt(self.sq_norms.max()))

    def operand(self, projection: Projection) -> Floats:
        """Return what the neighbours' panels are multiplied by, (blocks, words, ROWS)."""
        if id(projection) not in self.operands:
            found = self.coordinates.get(id(projection))
            if found is None and self.levels:
                _, found = self.gallery.loaded(self.levels, projection)
            elif found is None:
                sq_norms = torch.from_numpy(self.sq_norms.astype(np.float32))[None, None]
                along = projection.along(self.own[None], slice(None))
                [found] = projection.joined([along], sq_norms)
            self.operands[id(projection)] = packed_query(projection, found, self.longest)
        return self.operands[id(projection)]


def _kind(
    shapes: Sequence[tuple[int, ...]], query: Sequence[Array], kappa: int, distinct: bool, budget: float
) -> tuple[object, ...]:
    """Return what tells a search from those that earlier choices are not for."""
    return tuple(shapes), query[0][0].size, kappa, distinct, bool(np.isfinite(budget))


def _take_choice(
    gallery: BoundsGallery, query: Sequence[Array], distinct: bool, first: list[range], kappa: int, budget: float
) -> None:
    """Project the gallery as an earlier one of its kind, or as `_choose` does."""
    kind = _kind([level.shape for level in gallery.levels], query, kappa, distinct, budget)
    known = CHOICES.take(kind, gallery.centred_sample)
    if known is not None and known.projections:
        gallery.projections = known.projections
        return
    try:
        _choose(gallery, query, distinct, first, kappa, budget)
    except TooMuchLeftError:
        CHOICES.keep(kind, [], gallery.centred_sample)
        raise
    if gallery.projections[0].directions is not None or gallery.projections[0].kind == TILES:
        CHOICES.keep(kind, gallery.projections, gallery.centred_sample)


def _choose(
    gallery: BoundsGallery, query: Sequence[Array], distinct: bool, first: list[range], kappa: int, budget: float
) -> None:
    """Choose how the gallery is projected, by what some patches of the query find in the first neighbours.

    Raises:
        TooMuchLeftError: comparing all patches will take longer than the budget.
    """
    patches = query[0][0].size
    pairs = gallery.k * gallery.n * patches
    if pairs * gallery.depth * MULTIPLY <= WORTH:
        gallery.projections = [Projection(gallery.depth, None, narrow())]
        return
    asked = _Search.of(gallery, query, distinct, spread(patches, ASKED))
    gallery.projections = [provisional(gallery.centred_sample, gallery.directions)]
    if gallery.projections[0].is_plain or not np.isfinite(asked.longest):
        gallery.projections = [gallery.plain]
        return
    sides = gallery.centred_sample, gallery.directions, asked.own
    figures = (patches, gallery.measure_cost), gallery.spare_parts
    if gallery.projections[0].directions is None and np.isfinite(budget):  # to prepare the first would take long
        a_pair = fitted(*sides, likely_reach(*sides[::2], gallery.k * gallery.n), *figures)[1]
        if a_pair * pairs > budget:
            raise TooMuchLeftError
    worker = _Worker(asked, kappa, np.full(len(asked.query), np.inf, np.float32))
    worker.run(iter(first))
    within = torch.from_numpy(worker.best[:, 0]) * gallery.scale**2
    gallery.projections, a_pair = fitted(*sides, within, *figures)
    gallery.forget()
    if a_pair * pairs + LOAD * sum(level.size for level in gallery.levels) > budget:
        raise TooMuchLeftError


class _Worker:
    """One thread's share of the neighbours."""

    def __init__(self, search: _Search, kappa: int, reach: Floats, workers: int = 1, guess: bool = False) -> None:
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
        made = n if search.gallery.is_mixed else 0
        small = (
            np.empty(kappa, np.float32), np.empty(kappa, np.int64),
            np.empty((made, search.gallery.depth), np.float32), np.full(made, -1, np.int64),
        )  # fmt: skip
        rows = TILE_ROWS if narrow() == TILES else ROWS
        self.scratch = (
            lined_up((rows, -(-n // LOOK) * LOOK + LINE), np.inf), lined_up((rows, WIDTH)),
            np.empty(q, np.float64), np.empty(q, np.int64), small,
        )  # fmt: skip

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
        if not self.guess and gallery.is_striped(some):
            theirs, stripes = Prepared.none(wanted, len(some)), self.striper.stripes(some, wanted)
        else:
            if self.room is None:
                self.room = gallery.room(len(some))  # the first are the most
            theirs, stripes = gallery.prepared(some, wanted, self.room, self.guess), WHOLE
        projection = theirs.projection
        count, is_finite = kernels.compare(
            search.query, search.operand(projection), search.sq_norms, theirs.cells, theirs.cells_at, gallery.mix,
            gallery.parts, theirs.panels_at, stripes, np.int64(projection.words), theirs.largest,
            some.start * gallery.n,
            (gallery.scale**2, projection.doubt, projection.coarseness, search.longest),
            (gallery.n, gallery.length, search.distinct, projection.kind, self.guess),
            self.best, self.best_at, self.reach, self.scratch,
        )  # fmt: skip
        if gallery.scan and not is_finite:
            check_neighbours([level[some.start : some.stop] for level in gallery.levels])
        return int(count)
