"""Threads that share the query's patches: each patch meets all neighbours, which are prepared, in one thread.

Then nothing is found twice, and what is known of a patch is known to whoever compares it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...system.threads import in_one_thread
from ..sharing import share_out
from . import kernels, workers
from .boxes import along_axes, corners_of, sort_patches
from .nearby import farthest_of, look_nearby
from .plan import MULTIPLY, Projection
from .prepared import Prepared
from .products_tiles import TILE_ROWS
from .simd import ROWS, TILES
from .sources import Floats, Ints
from .workers import Search, scratch_of

PIECE = 4e6  # nanoseconds of products, in the unit of plan.MULTIPLY, that are worth a thread; each reads all panels

Ready = Sequence[tuple[range, Prepared]]


def by_rows(search: Search, kappa: int, reach: Floats, threads: int) -> tuple[Floats, Ints, bool]:
    """Let each thread compare its share of the query's patches with all neighbours, if these are prepared.

    Args:
        search: the query's side.
        kappa: number of nearest patches.
        reach: (q,) what no kappa-th nearest squared distance is above; lowered.
        threads: how many, at most.

    Returns:
        heaps (q, kappa) of the nearest, their positions, and whether they are complete: not if the neighbours are not
        prepared, or so many patches are left to be measured that bounds are not worth it.
    """
    gallery, q = search.gallery, len(search.query)
    best, best_at = np.full((q, kappa), np.inf, np.float32), np.full((q, kappa), -1, np.int64)
    ready = [] if gallery.scan else gallery.ready(threads)
    kinds = {theirs.projection.kind for _, theirs in ready}
    if len(kinds) != 1 or any(theirs.projection is not gallery.projection(some.start) for some, theirs in ready):
        return best, best_at, False
    block, order = TILE_ROWS if TILES in kinds else ROWS, np.arange(q)
    if all(theirs.is_sorted for _, theirs in ready):
        search, order = in_one_thread(_arranged, search, ready[0][1].projection)
    for _, theirs in ready:  # else each thread would make it
        in_one_thread(search.operand, theirs.projection, True)
    bounds = reach[order]
    pair = sum(len(some) * theirs.projection.cost for some, theirs in ready)
    blocks = -(-q // block)
    number = max(1, min(threads, blocks, int(q * gallery.n * pair / PIECE)))
    pieces = [range(blocks * at // number, blocks * (at + 1) // number) for at in range(number)]
    shares = [_Worker(search, ready, block, (best, best_at, bounds)) for _ in pieces]
    share_out(pieces, shares)
    gallery.measured(sum(share.measured for share in shares))
    reach[order], best[order], best_at[order] = bounds, best.copy(), best_at.copy()
    return best, best_at, not any(share.is_crowded for share in shares)


def _arranged(search: Search, projection: Projection) -> tuple[Search, Ints]:
    """Return the search with patches that are alike side by side, as neighbours' are, and their order."""
    order, told_apart = np.arange(len(search.query)), along_axes(search.located(projection, True).numpy(), projection)
    sort_patches(told_apart, ROWS, order)
    return search.in_order(order, projection, corners_of(told_apart[:, order])), order


class _Worker:
    """One thread's share of the query's patches."""

    def __init__(self, search: Search, ready: Ready, block: int, found: tuple[Floats, Ints, Floats]) -> None:
        """Compare blocks of so many patches with neighbours that are `ready`; all workers share what is `found`."""
        self.search, self.ready, self.block, self.found = search, ready, block, found
        self.is_crowded, self.measured, gallery = False, 0, search.gallery
        self.most = workers.CROWD * block * gallery.n * gallery.k * gallery.depth * MULTIPLY / gallery.measure_cost
        self.scratch = scratch_of(gallery, len(search.query), found[0].shape[1])

    def run(self, work: Iterator[range]) -> None:
        """Compare blocks of the query's patches until there are no more, or too much of one is left to be measured."""
        with np.errstate(over="ignore", invalid="ignore"):
            for blocks in work:
                measured = self.compare(blocks)
                self.measured += measured
                self.is_crowded |= measured > self.most * len(blocks)
                if self.is_crowded:
                    break

    def compare(self, blocks: range) -> int:
        """Compare some blocks with all neighbours; returns the number of patches that were measured."""
        search, gallery, measured = self.search, self.search.gallery, 0
        rows = slice(blocks.start * self.block, blocks.stop * self.block)
        query, norms, best, best_at, reach = (each[rows] for each in (search.query, search.norms, *self.found))
        out, least, near, near_at, *others = self.scratch
        if not reach.max() < np.inf:
            self._look_nearby(blocks, rows)
        for some, theirs in self.ready:
            projection = theirs.projection
            if theirs.is_sorted and not reach.max() < np.inf:
                self.is_crowded = True  # by distances that overflow: neighbours are compared as they are
                return measured
            count, _ = kernels.compare(
                query, search.operand(projection)[blocks.start : blocks.stop], norms, theirs.cells, theirs.cells_at,
                gallery.mix, gallery.parts, theirs.panels_at, None, np.int64(projection.words), theirs.largest,
                (theirs.sorted_at, search.corners[blocks.start : blocks.stop]), some.start * gallery.n,
                search.figures(projection),
                (gallery.n, gallery.length, search.distinct, projection.kind, False), best, best_at, reach,
                (out, least, near[: len(query)], near_at[: len(query)], *others),
            )  # fmt: skip
            measured += int(count)
        return measured

    def _look_nearby(self, blocks: range, rows: slice) -> None:
        """Bound how far the nearest patches of some blocks are."""
        search, gallery, reach = self.search, self.search.gallery, self.found[2][rows]
        shape = len(reach), self.found[0].shape[1]
        likely, likely_at = np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int64)
        for some, theirs in self.ready:
            projection = theirs.projection
            if projection.kind == TILES:
                return
            look_nearby(
                search.operand(projection)[blocks.start : blocks.stop], (some.start * gallery.n, gallery.n),
                (projection.kind, theirs.panels_at, np.int64(projection.words)), (search.longest, theirs.largest),
                (theirs.sorted_at, search.corners[blocks.start : blocks.stop]), (rows.start, len(search.query)),
                likely, likely_at, self.scratch[:2],
            )  # fmt: skip
        cells_at = np.concatenate([theirs.cells_at for _, theirs in self.ready])
        farthest_of(search.query[rows], cells_at, (gallery.n, gallery.length), likely_at, reach)
