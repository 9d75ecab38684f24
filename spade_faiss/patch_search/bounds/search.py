"""Exact search by bounds: a few directions rule most patches out, and what is left is measured.

Let P be m orthonormal directions. Then |q - x|^2 >= |Pq - Px|^2 + (|q - P'Pq| - |x - P'Px|)^2, a squared distance of
m + 1 numbers in place of all channels. If the directions hold most of the variance, few patches are left whose bound is
under the nearest found so far: these are measured as sums of squares. What rounding can do to a bound is counted into
it, so nothing is lost. Where directions do not pay, the bound is the product of all channels.

Upsampling is linear: of several levels, each is projected at its own resolution, and the coordinates are upsampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...arrays import Array
from ...errors import FeatureError
from ...system.threads import in_one_thread, torch_threads
from ..heaps import keep_nearest
from ..sharing import share_out
from .choices import CHOICES
from .gallery import BoundsGallery, spread
from .plan import MULTIPLY, Projection, fitted, likely_reach, narrow, provisional
from .rows import by_rows
from .simd import BYTES, QUADS, TILES
from .sources import Floats, Ints
from .workers import Search, Worker

CHUNK_BYTES = 2**19  # neighbours' patches loaded at a time
FIRST = 4  # neighbours searched before directions are chosen; if matches are distinct, kappa more
GUESSES = 2  # neighbours of each thread whose likeliest patches are measured first: few are left then
WORTH = 5e7  # nanoseconds of products of all channels that are worth the choice of directions
LOAD = 12.0  # nanoseconds that a value of a neighbour takes to be prepared
ASKED = 64  # patches of the query that try directions


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
    kind = _kind([level.shape for level in gallery], query, kappa, False, budget)
    if np.isfinite(budget) and CHOICES.take(kind):
        raise TooMuchLeftError
    with np.errstate(over="ignore", invalid="ignore"):
        prepared = in_one_thread(_gallery, gallery, query, kind, torch_threads())
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
        budget: nanoseconds of one core, in the unit of plan.MULTIPLY, that the search may take.

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
        search = in_one_thread(Search.of, gallery, query, distinct)
        if not np.isfinite(search.longest):
            gallery.projections = [gallery.plain]
        reach = np.full(len(search.query), np.inf, np.float32) if reach is None else reach
        best, best_at, is_done = by_rows(search, kappa, reach, threads)
        if not is_done:
            for projection in {id(each): each for each in gallery.projections}.values():  # else each thread would
                in_one_thread(search.operand, projection, True)
            number, guesses = min(threads, len(chunks)), 0
            if not distinct and gallery.projection(0).directions is not None:
                guesses = guessed
            best, best_at = _by_neighbours(search, kappa, reach, chunks, guesses, number)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    order = np.lexsort((best_at, best), axis=1)
    return np.take_along_axis(best, order, 1), np.take_along_axis(best_at, order, 1)


def _by_neighbours(
    search: Search, kappa: int, reach: Floats, chunks: list[range], guesses: int, threads: int
) -> tuple[Floats, Ints]:
    """Let each thread compare all of the query with its share of the neighbours; returns heaps (q, kappa).

    The likeliest patches of the first `guesses` chunks are measured before.
    """
    workers = [Worker(search, kappa, reach, threads) for _ in range(threads)]
    if guesses:
        share_out(chunks[:guesses], [Worker(search, kappa, reach, guess=True) for _ in range(threads)])
    share_out(chunks, workers)
    search.gallery.measured(sum(worker.measured for worker in workers))
    best, best_at = workers[0].best, workers[0].best_at
    for other in workers[1:]:
        lanes, entries = np.nonzero(other.best_at >= 0)
        keep_nearest(lanes, other.best_at[lanes, entries], other.best[lanes, entries], best, best_at)
    return best, best_at


def _kind(
    shapes: Sequence[tuple[int, ...]], query: Sequence[Array], kappa: int, distinct: bool, budget: float
) -> tuple[object, ...]:
    """Return what tells a search from those that earlier choices are not for."""
    return tuple(shapes), query[0][0].size, kappa, distinct, bool(np.isfinite(budget))


def _gallery(levels: list[Array], query: list[Array], kind: tuple[object, ...], threads: int) -> BoundsGallery:
    """Return neighbours, projected as earlier ones of their kind if a glance shows that this suits them."""
    frame = CHOICES.frame(kind)
    if frame is not None:
        found = BoundsGallery(levels, query, 0, frame, False, threads)
        known = CHOICES.take(kind, found.glance)
        if known is not None and known.frame is frame:
            found.projections = known.projections
            return found
    return BoundsGallery(levels, query, 0, None, False, threads)


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
    if gallery.projections[0].directions is not None or gallery.projections[0].kind in (TILES, QUADS, BYTES):
        CHOICES.keep(kind, gallery.projections, gallery.centred_sample, gallery.frame.moved(gallery.shift))


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
    asked = Search.of(gallery, query, distinct, spread(patches, ASKED))
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
    worker = Worker(asked, kappa, np.full(len(asked.query), np.inf, np.float32))
    worker.run(iter(first))
    within = torch.from_numpy(worker.best[:, 0]) * gallery.scale**2
    gallery.projections, a_pair = fitted(*sides, within, *figures)
    gallery.forget()
    if a_pair * pairs + LOAD * sum(level.size for level in gallery.levels) > budget:
        raise TooMuchLeftError
