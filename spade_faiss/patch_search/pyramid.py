"""Patch search from inner products at native resolution: exact, without upsampling the gallery.

With U the upsampling of a level, which is linear, <U a, U b> = U <a, b> U^T: the inner products of upsampled maps are
the upsampled inner products. Only the finest level needs the product of all pairs of patches; a coarser level's is
smaller by the fourth power of its scale, and is interpolated where it is used (`kernels.scan`).

The products only choose candidates. Each is known up to a doubt, bounded from what rounding took of each patch
(`plan.doubts`), so bfloat16 serves where the machine multiplies it faster. A patch is a candidate as long as its lower
bound does not exceed the kappa-th least upper bound. Candidates' distances are then sums of squares: no rounding hides
a nearer patch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..errors import FeatureError
from ..features import Array
from . import kernels
from .plan import Floats, Ints, Plan, bfloat16_pays, load, rounded
from .plan import doubts as doubts_of
from .vectors import PAIR, VECTOR

TILE_BYTES = 3 * 2**19  # of products at a time: they stay in a core's cache until they are used
TILE_PATCHES = 224  # gallery patches of a tile: enough for a product at full speed
BLOCK_PATCHES = 192  # query patches compared at a time, at least; their blended coarser products stay in cache too
CANDIDATES = 2**20  # a thread keeps before it decides among them
FIRST_ROUND = 4  # candidates of a query patch that are measured at a time, at first


def search_pyramid(query: list[Array], gallery: list[Array], kappa: int) -> tuple[Floats, Ints]:
    """Search all neighbours on the CPU with torch's number of threads; see search_patches.

    Returns:
        sq_distances (h * w, kappa) and matches (h * w, kappa): positions counted through neighbour, row, column.
    """
    plan = Plan.make(query, bfloat16_pays())
    k, height, threads = len(gallery[0]), plan.grids[0][0], torch.get_num_threads()
    bands = min(height, -(-2 * threads // k))
    edges = [height * band // bands for band in range(bands + 1)]
    work = [(n, top, end) for n in range(k) for top, end in pairwise(edges)]
    workers = [Worker(plan, query, gallery, kappa) for _ in range(min(threads, len(work)))]
    if len(workers) == 1:
        workers[0].run(iter(work))
    else:
        _in_threads(workers, work, threads)
    first, *others = workers
    found = Candidates.joined([worker.candidates() for worker in workers])
    for other in others:  # what they have already measured
        lanes, entries = np.nonzero(other.best_at >= 0)
        at = other.best_at[lanes, entries]
        kernels.keep_nearest(lanes, at, other.best[lanes, entries], first.best, first.best_at)
    first.decide(found)
    order = np.lexsort((first.best_at, first.best), axis=1)
    best = np.take_along_axis(first.best, order, 1)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return best, np.take_along_axis(first.best_at, order, 1)


def _in_threads(workers: list[Worker], work: list[tuple[int, int, int]], threads: int) -> None:
    lock, items = threading.Lock(), iter(work)

    def shared() -> Iterator[tuple[int, int, int]]:
        while True:
            with lock:
                item = next(items, None)
            if item is None:
                return
            yield item

    def run(worker: Worker) -> None:
        torch.set_num_threads(1)  # of this thread: every worker multiplies its own tiles
        worker.run(shared())

    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(run, workers))
    finally:
        torch.set_num_threads(threads)  # threads that are started from now on would inherit the 1


@dataclass
class Candidates:
    """Pairs that may be among the nearest, parallel arrays (m,)."""

    lanes: Ints  # query patch
    places: Ints  # gallery patch: position
    lows: Floats  # half a squared distance is at least this less the query patch's doubt
    highs: Floats  # and at most this plus that

    @classmethod
    def joined(cls, parts: list[Candidates]) -> Candidates:
        """Concatenate, in the order of positions."""
        lanes, places, lows, highs = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("lanes", "places", "lows", "highs")
        )
        return cls(lanes, places, lows, highs).where(np.argsort(places, kind="stable"))

    def where(self, rows: Array) -> Candidates:
        """Return some of them."""
        return Candidates(self.lanes[rows], self.places[rows], self.lows[rows], self.highs[rows])

    def __len__(self) -> int:
        return len(self.lanes)


class Worker:
    """One thread's share of the search: compares bands of neighbours in the order of positions, keeps candidates."""

    def __init__(self, plan: Plan, query: list[Array], gallery: list[Array], kappa: int) -> None:
        self.plan, self.query, self.gallery = plan, query, gallery
        (height, width), columns = plan.grids[0], sum(grid[1] for grid in plan.grids[1:])
        patches = height * width
        self.bounds = np.full(patches + VECTOR, -np.inf, np.float32)  # of lows; padding passes none
        self.bounds[:patches] = np.inf
        self.heap = np.full((patches, kappa), np.inf, np.float32)  # the kappa least highs
        self.best, self.best_at = np.full((patches, kappa), np.inf, np.float32), np.full((patches, kappa), -1, np.int64)
        whole = VECTOR // np.gcd(VECTOR, width)  # rows of query patches that fill vectors
        self.block_rows = int(min(-(-BLOCK_PATCHES // (width * whole)) * whole, -(-height // whole) * whole))
        lanes = self.block_rows * width
        size = max(CANDIDATES, 4 * PAIR * lanes * width)
        self.found = (
            np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32), np.empty(size, np.float32),
            np.zeros(1, np.int64),
        )  # fmt: skip
        self.scratch = (
            np.zeros((2, columns * lanes), np.float32), np.zeros(columns * lanes, np.float32),
            np.zeros(PAIR * lanes, np.float32),
        )  # fmt: skip
        self.tile_rows = max(1, min(TILE_PATCHES // width, height))
        itemsize = 2 if plan.narrow else 4
        blocks = TILE_BYTES // itemsize // (self.tile_rows * width) // lanes
        self.tile_columns = max(1, blocks) * self.block_rows  # rows of query patches in a tile
        self.pairs = plan.pairs()
        self.sizes = np.array([grid[::-1] for grid in plan.grids[1:]], np.int64).reshape(-1, 2)

    def run(self, work: Iterator[tuple[int, int, int]]) -> None:
        """Compare bands (neighbour, first row, end) until there are no more."""
        for neighbour, top, end in work:
            self.compare_band(neighbour, top, end)

    def candidates(self) -> Candidates:
        """Return what was found."""
        kernels.drop_hopeless(*self.found, self.bounds)
        count = int(self.found[-1][0])
        return Candidates(*(part[:count].copy() for part in self.found[:-1]))

    def compare_band(self, neighbour: int, top: int, end: int) -> None:
        """Compare rows top to end of a neighbour's patches with all of the query's."""
        plan = self.plan
        height, width = plan.grids[0]
        norms = np.zeros((3, end - top, width), np.float32)
        coarse, starts = [np.zeros(0, np.float32)], []
        for number, level in enumerate(self.gallery):
            across, rows = plan.grids[number][1], plan.rows[number, top:end]
            first = int(rows[0, 0])
            values, shift = load(level[neighbour, :, first : int(rows[-1, 1]) + 1], plan.shifts[number])
            operand, sums = rounded(values, across, shift, plan.scale, plan.narrow, values.shape[1])
            kernels.add_norms(
                sums, across, rows - first, plan.row_weights[number, top:end],
                plan.columns[number], plan.column_weights[number], norms,
            )  # fmt: skip
            if number == 0:
                finest = operand
            else:
                starts.append((sum(map(len, coarse)), first))
                products = (operand.t() @ plan.operands[number]).float().view(-1, across)
                coarse.append((products @ plan.across[number - 1]).reshape(-1).numpy())
        pairs = len(self.pairs[0])
        limits = np.full((2, end - top, PAIR * pairs), np.nan, np.float32)  # what is compared with NaN never passes
        limits[1, :, :width] = doubts_of(norms, plan.channels, plan.narrow)
        limits[0, :, :width] = norms[0] / 2 - limits[1, :, :width]
        flat = np.concatenate(coarse)
        origins = np.array(starts, np.int64).reshape(-1, 2)
        for row in range(top, end, self.tile_rows):
            count = min(self.tile_rows, end - row)
            mine = finest[:, (row - top) * width :][:, : count * width].t()
            place = (neighbour * height + row) * width
            band = (origins, limits[0], limits[1], place)
            for first in range(0, height, self.tile_columns):
                last = min(first + self.tile_columns, height)
                self.compare_tile(mine, flat, band, (row, row - top, count, first, last))

    def compare_tile(self, mine: torch.Tensor, coarse: Floats, band: tuple[Any, ...], tile: tuple[int, ...]) -> None:
        """Multiply some rows of a neighbour's patches with some rows of the query's, and scan the products."""
        plan, (height, width), count, first, last = self.plan, self.plan.grids[0], *tile[2:]
        theirs = plan.operands[0][:, first * width :][:, : -(-(last - first) * width // VECTOR) * VECTOR]
        products = torch.empty(count * width + 1, theirs.shape[1], dtype=mine.dtype)  # a pair may end past the last
        torch.mm(mine, theirs, out=products[:-1])
        values = products.view(torch.int16).numpy().view(np.uint16) if plan.narrow else products.numpy()
        resume = (first, 0)
        while True:
            stopped = kernels.scan(
                values, coarse, (0,) * len(self.sizes),
                (plan.rows[1:], plan.row_weights[1:], *self.pairs, self.sizes),
                band, (width, *tile, self.block_rows, *resume),
                (self.bounds, plan.doubts, self.heap), self.found, self.scratch,
            )  # fmt: skip
            if stopped < 0:
                return
            resume = divmod(stopped, height)
            self.settle()

    def settle(self) -> None:
        """Measure the candidates, so that there is room for others."""
        plan, patches = self.plan, len(self.heap)
        self.decide(self.candidates())
        self.found[-1][0] = 0
        nearest = self.best[:, 0].astype(np.float64) * plan.scale**2
        bounds = (nearest * (1 + 1e-6) - plan.sq_norms) / 2 + plan.doubts
        # Nothing comes before an exact match in the order of positions.
        bounds = np.where(nearest == 0, -np.inf, bounds)
        self.bounds[:patches] = np.minimum(self.bounds[:patches], bounds)

    def decide(self, found: Candidates) -> None:
        """Measure those candidates, in the order of positions, that can be among the nearest, into best."""
        likely, likely_at = np.full_like(self.heap, np.inf), np.full_like(self.best_at, -1)
        kernels.keep_nearest(found.lanes, found.places, found.highs, likely, likely_at)
        chosen = (found.highs < likely[found.lanes, 0]) | (found.places == likely_at[found.lanes, 0])
        limit = FIRST_ROUND
        while len(found):
            some = found.where(chosen)
            sq_distances = self.measure(some)
            kernels.keep_nearest(some.lanes, some.places, sq_distances, self.best, self.best_at)
            found = found.where(~chosen)
            nearest = self.best[found.lanes, 0].astype(np.float64) * self.plan.scale**2
            least = self.plan.sq_norms[found.lanes] + 2.0 * (found.lows - self.plan.doubts[found.lanes])
            earlier = (nearest > 0) | (found.places < self.best_at[found.lanes, 0])
            found = found.where((least <= nearest * (1 + 1e-6)) & earlier)
            chosen = kernels.rank(found.lanes, len(self.heap)) < limit
            limit *= 4

    def measure(self, some: Candidates) -> Floats:
        """Return the candidates' squared distances, as sums of squares (m,)."""
        plan = self.plan
        sums = np.zeros(len(some), np.float64)
        neighbours, theirs = np.divmod(some.places, len(self.heap))
        order = np.argsort(neighbours, kind="stable")
        cuts = np.flatnonzero(np.diff(neighbours[order])) + 1
        for rows in np.split(order, cuts):
            if not len(rows):
                continue
            part = np.zeros(len(rows), np.float64)
            for number, level in enumerate(self.gallery):
                values, shift = load(level[neighbours[rows[0]]], plan.shifts[number])
                kernels.add_differences(
                    plan.native[number], values, shift, *self._taps(number, some.lanes[rows]),
                    *self._taps(number, theirs[rows]), part,
                )  # fmt: skip
            sums[rows] = part
        with np.errstate(over="ignore"):
            return sums.astype(np.float32)

    def _taps(self, level: int, patches: Ints) -> tuple[Ints, Floats]:
        """Cells of a level under patches, and their weights, (4, m)."""
        plan, across = self.plan, self.plan.grids[level][1]
        y, x = np.divmod(patches, plan.grids[0][1])
        rows, columns = plan.rows[level, y].T, plan.columns[level, x].T
        cells = (rows[:, None] * across + columns).reshape(4, -1)
        weights = plan.row_weights[level, y].T[:, None] * plan.column_weights[level, x].T
        return np.ascontiguousarray(cells), np.ascontiguousarray(weights.reshape(4, -1))
