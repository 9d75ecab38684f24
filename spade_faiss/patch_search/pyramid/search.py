"""Patch search from inner products at native resolution: exact, without upsampling the gallery.

Let U be the upsampling of a level, which is linear. Then <U a, U b> = U <a, b> U^T: the inner products of upsampled
maps are the upsampled inner products. Only the finest level needs the product of all pairs of patches. A coarser
level's product is smaller and is interpolated where it is used (`kernels.scan`): always on the gallery's side,
and on the query's side where that is less work (`plan.Coarse`).

The products only choose candidates. The error of each is bounded by its doubt (`plan.doubts`), so bfloat16
serves where the machine multiplies it faster. A patch is a candidate as long as its lower bound does not exceed the
kappa-th least upper bound. Candidates' distances are then computed as sums of squares: no rounding hides a nearer
patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...arrays import Array
from ...errors import FeatureError
from ...system.threads import in_one_thread, single_threads, torch_threads
from ..compiled import VECTOR
from ..heaps import keep_nearest
from ..sharing import share_out
from . import kernels
from .plan import Floats, Ints, Plan, bfloat16_pays, doubts, lifted, load, rounded
from .simd import PAIR

TILE_BYTES = 3 * 2**19  # products at a time: they stay in a core's cache until they are used
CANDIDATES = 2**20  # kept by all threads together before they are measured: 24 MiB
NARROW_KAPPA = 8  # beyond it, what bfloat16 leaves to be measured takes longer than products in float32
FIRST_ROUND = 4  # candidates per query patch measured in the first round; each round takes 4 times as many
CROWD = 32  # a query patch with more candidates still in doubt after two rounds is crowded
TOO_MANY = 20_000  # candidates of crowded patches; to measure more takes longer than to search again
CLUSTERS = 4  # groups of query patches in the second search


def is_narrow(kappa: int) -> bool:
    """Return whether products are of bfloat16 on this machine, for kappa matches."""
    return kappa <= NARROW_KAPPA and bfloat16_pays()


def search_pyramid(query: list[Array], gallery: list[Array], kappa: int) -> tuple[Floats, Ints]:
    """Search all neighbours on the CPU with torch's number of threads; see search_patches.

    Products cannot tell the nearest of many almost equal patches, as in a plain background. Such query patches are
    searched again in groups, with the origin moved among them: distances are then large beside rounding errors.

    Returns:
        sq_distances (h * w, kappa) and matches (h * w, kappa): positions counted through neighbour, row, column.
    """
    plan = in_one_thread(Plan.make, query, is_narrow(kappa))
    best, best_at, undecided = _search(plan, plan, gallery, kappa, False)
    for lanes in in_one_thread(_clusters, plan, np.flatnonzero(undecided)):
        centred = in_one_thread(plan.centred, query, lanes)
        best[lanes], best_at[lanes], _ = _search(centred, plan, gallery, kappa, True)
    order = np.lexsort((best_at, best), axis=1)
    best = np.take_along_axis(best, order, 1)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return best, np.take_along_axis(best_at, order, 1)


def _search(plan: Plan, origin: Plan, gallery: list[Array], kappa: int, final: bool) -> tuple[Floats, Ints, Array]:
    """Search for the patches of a plan.

    Args:
        plan: prepared for the products.
        origin: the plan of the whole query, with which distances are measured.
        gallery: levels [(K, c, h, w), ...].
        kappa: number of nearest patches.
        final: whether every patch must be decided, however long it takes.

    Returns:
        the nearest (q, kappa), their positions, and which patches are undecided (q,).
    """
    k, (height, width), threads = len(gallery[0]), plan.grids[0], torch_threads()
    row_bytes = plan.finest[0].shape[1] * plan.finest[0].itemsize * width
    bands = min(height, max(-(-2 * threads // k), -(-height * row_bytes // TILE_BYTES)))
    edges = [height * band // bands for band in range(bands + 1)]
    work = [(n, top, end) for n in range(k) for top, end in pairwise(edges)]
    number = min(threads, len(work))
    workers = [Worker(plan, origin, gallery, kappa, final, CANDIDATES // number) for _ in range(number)]
    share_out(work, workers)
    first, *others = workers
    if len(workers) > 1:
        first.map = single_threads(len(workers)).map
    found = Candidates.joined([worker.candidates() for worker in workers])
    for other in others:  # they have already measured some
        first.undecided |= other.undecided
        lanes, entries = np.nonzero(other.best_at >= 0)
        at = other.best_at[lanes, entries]
        keep_nearest(lanes, at, other.best[lanes, entries], first.best, first.best_at)
    first.decide(found.where(~first.undecided[found.lanes]))
    return first.best, first.best_at, first.undecided


def _clusters(plan: Plan, lanes: Ints) -> list[Ints]:
    """Group query patches around a few of them that are far from each other."""
    if not len(lanes):
        return []
    sq_distances = []
    levels = [lifted(level, grid, plan.grids[0])[:, lanes] for level, grid in zip(plan.native, plan.grids, strict=True)]
    centre = 0
    for _ in range(min(CLUSTERS, len(lanes))):
        differences = [np.square(level - level[:, centre, None]).sum(axis=0) for level in levels]
        sq_distances.append(np.sum(differences, axis=0))
        centre = int(np.min(sq_distances, axis=0).argmax())
    nearest = np.argmin(sq_distances, axis=0)
    return [lanes[nearest == number] for number in range(len(sq_distances)) if (nearest == number).any()]


def _turned(operand: torch.Tensor) -> torch.Tensor:
    """Return (c, cells) as (cells, c), in the memory order in which the product is faster."""
    return operand.t().contiguous() if operand.dtype == torch.bfloat16 else operand.t()


@dataclass
class Candidates:
    """Pairs that may be among the nearest, parallel arrays (m,)."""

    lanes: Ints  # query patch
    places: Ints  # gallery patch: position
    lows: Floats  # half a squared distance is at least this minus the query patch's doubt
    highs: Floats  # and at most this plus the query patch's doubt

    @classmethod
    def joined(cls, parts: list[Candidates]) -> Candidates:
        """Concatenate, in the order of positions."""
        lanes, places, lows, highs = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("lanes", "places", "lows", "highs")
        )
        return cls(lanes, places, lows, highs).where(np.argsort(places, kind="stable"))

    def where(self, rows: Array) -> Candidates:
        """Return the candidates at these rows."""
        return Candidates(self.lanes[rows], self.places[rows], self.lows[rows], self.highs[rows])

    def __len__(self) -> int:
        return len(self.lanes)


class Worker:
    """One thread's share of the search: compares bands of neighbours in the order of positions and keeps candidates."""

    def __init__(self, plan: Plan, origin: Plan, gallery: list[Array], kappa: int, final: bool, room: int) -> None:
        self.plan, self.origin, self.gallery, self.final = plan, origin, gallery, final
        height, width = plan.grids[0]
        patches, self.a_neighbour = len(plan.lanes), height * width
        self.undecided = np.zeros(patches, bool)
        self.map: Callable[..., Iterable[None]] = map  # measures several neighbours
        self.bounds = np.full(patches + VECTOR, -np.inf, np.float32)  # lows above these are dropped; padding keeps none
        self.bounds[:patches] = np.inf
        self.heap = np.full((patches, kappa), np.inf, np.float32)  # the kappa least highs
        self.best, self.best_at = np.full((patches, kappa), np.inf, np.float32), np.full((patches, kappa), -1, np.int64)
        size = max(room, 4 * PAIR * plan.block * width)
        self.found = (
            np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32), np.empty(size, np.float32),
            np.zeros(1, np.int64),
        )  # fmt: skip
        levels, n = [coarse.level for coarse in plan.coarser], plan.finest[0].shape[1]
        columns = np.array([plan.grids[level][1] for level in levels], np.int64)
        self.scratch = np.zeros(int(columns.sum()) * n, np.float32), np.zeros(PAIR * n, np.float32)
        rows, weights = plan.upsampling.rows[levels], plan.upsampling.row_weights[levels]
        self.coarse_taps = rows, weights, *plan.upsampling.pairs(levels), columns

    def run(self, work: Iterator[tuple[int, int, int]]) -> None:
        """Compare bands (neighbour, first row, end) until there are no more."""
        with np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances, and is refused there
            for neighbour, top, end in work:
                self.compare_band(neighbour, top, end)

    def candidates(self) -> Candidates:
        """Return the candidates that still pass their bounds."""
        kernels.drop_hopeless(*self.found, self.bounds)
        count = int(self.found[-1][0])
        return Candidates(*(part[:count].copy() for part in self.found[:-1]))

    def compare_band(self, neighbour: int, top: int, end: int) -> None:
        """Compare rows top to end of a neighbour's patches with all of the query's."""
        plan, (height, width) = self.plan, self.plan.grids[0]
        norms = np.zeros((4, end - top, width), np.float32)
        operands = [self.operand(number, neighbour, (top, end), norms) for number in range(len(self.gallery))]
        finest = [operand for operand, grid in zip(operands, plan.grids, strict=True) if grid == plan.grids[0]]
        mine = _turned(torch.cat(finest) if len(finest) > 1 else finest[0])
        coarser = []
        for coarse in plan.coarser:
            side = _turned(operands[coarse.level])
            coarser.append(side if coarse.lifted else torch.mm(side, coarse.native))
        limits = np.full((2, end - top, width + width % PAIR), np.nan, np.float32)  # NaN: nothing passes
        limits[1, :, :width] = doubts(norms, plan.channels)
        limits[0, :, :width] = norms[0] / 2 - limits[1, :, :width]
        firsts = np.array([plan.upsampling.rows[coarse.level, top, 0] for coarse in plan.coarser], np.int64)
        band = (firsts, limits[0], limits[1], (neighbour * height + top) * width)
        for number in range(len(plan.finest)):
            self.compare_tile(mine, coarser, band, number, top)

    def operand(self, number: int, neighbour: int, band: tuple[int, int], norms: Floats) -> torch.Tensor:
        """Return the rows of a neighbour's level under a band of patches as (c, cells); add to the patches' norms.

        Args:
            number: the level.
            neighbour: its number.
            band: first row of patches, and the end.
            norms: norms of these patches, see kernels.add_norms.
        """
        plan, taken, rows = self.plan, self.plan.upsampling, self.plan.upsampling.rows[number, slice(*band)]
        first, across = int(rows[0, 0]), plan.grids[number][1]
        level = self.gallery[number][neighbour, :, first : int(rows[-1, 1]) + 1]
        values, shift = load(level, plan.shifts[number])
        operand, sums = rounded(values, across, shift, plan.scale, plan.narrow[number])
        kernels.add_norms(
            sums, across, rows - first, taken.row_weights[number, slice(*band)],
            taken.columns[number], taken.column_weights[number], plan.narrow[number], norms,
        )  # fmt: skip
        return operand

    def compare_tile(
        self, mine: torch.Tensor, coarser: list[torch.Tensor], band: tuple[Any, ...], number: int, top: int
    ) -> None:
        """Multiply a band of a neighbour with one block of the query's patches, and scan the products.

        Args:
            mine: (patches of the band, c) of the finest grid.
            coarser: for each coarser level, the band's cells (cells, c), or their products with all the query's cells.
            band: as kernels.scan takes it.
            number: the block.
            top: first row of the band.
        """
        plan, theirs = self.plan, self.plan.finest[number]
        products = torch.empty(len(mine) + 1, theirs.shape[1], dtype=mine.dtype)  # a pair may end past the last
        torch.mm(mine, theirs, out=products[:-1])
        coarse = []
        for level, values in zip(plan.coarser, coarser, strict=True):
            if level.lifted:
                coarse.append(torch.mm(values, level.lifted[number]))
            else:
                first, matrix = level.spread[number]
                coarse.append(torch.mm(values[:, first : first + len(matrix)], matrix))
        sources = [(values.data_ptr(), values.dtype == torch.bfloat16) for values in coarse]
        bits = products.view(torch.int16).numpy().view(np.uint16) if plan.narrow[0] else products.numpy()
        width, start, row = plan.grids[0][1], number * plan.block, 0
        wide = min(plan.block, len(self.heap) - start)
        while row >= 0:
            row = kernels.scan(
                bits, np.array(sources, np.int64).reshape(-1, 2), (0,) * len(coarse), self.coarse_taps, band,
                (width, top, len(mine) // width, start, wide, row),
                (self.bounds, plan.doubts, self.heap), self.found, self.scratch,
            )  # fmt: skip
            if row >= 0:
                self.settle()

    def settle(self) -> None:
        """Measure the candidates to make room for others."""
        plan = self.plan
        self.decide(self.candidates())
        self.found[-1][0] = 0
        nearest = self._reach(np.arange(len(self.best)))
        # Nothing that follows an exact match in the order of positions can replace it.
        over = (self.best[:, 0] == 0) | self.undecided
        bounds = np.where(over, -np.inf, (nearest - plan.sq_norms) / 2 + plan.doubts)
        self.bounds[: len(bounds)] = np.minimum(self.bounds[: len(bounds)], bounds)

    def _reach(self, lanes: Ints) -> NDArray[np.float64]:
        """Return squared distances, at scale, beyond which no patch can be as near as the kappa-th nearest so far."""
        nearest = self.best[lanes, 0].astype(np.float64) * self.plan.scale**2
        off = 2.0**-22 * np.sqrt(self.origin.sq_norms[self.plan.lanes[lanes]], dtype=np.float64)
        reach = nearest * (1 + 1e-6) + 2 * np.sqrt(nearest) * off + off**2
        return np.where(np.isinf(nearest), np.inf, reach)  # infinity times 0 would be NaN

    def decide(self, found: Candidates) -> None:
        """Measure the candidates that can be among the nearest, in the order of positions, and keep the best."""
        likely, likely_at = np.full_like(self.heap, np.inf), np.full_like(self.best_at, -1)
        keep_nearest(found.lanes, found.places, found.highs, likely, likely_at)
        last, last_at = likely[found.lanes, 0], likely_at[found.lanes, 0]
        chosen = (found.highs < last) | ((found.highs == last) & (found.places <= last_at))
        limit = FIRST_ROUND
        while len(found):
            some = found.where(chosen)
            sq_distances = self.measure(some)
            keep_nearest(some.lanes, some.places, sq_distances, self.best, self.best_at)
            found = found.where(~chosen)
            least = self.plan.sq_norms[found.lanes] + 2.0 * (found.lows - self.plan.doubts[found.lanes])
            earlier = (self.best[found.lanes, 0] > 0) | (found.places < self.best_at[found.lanes, 0])
            found = found.where((least <= self._reach(found.lanes)) & earlier)
            if not self.final and limit > FIRST_ROUND:
                crowded = np.bincount(found.lanes, minlength=len(self.heap))[found.lanes] > CROWD
                if crowded.sum() > TOO_MANY:
                    self.undecided[found.lanes[crowded]] = True
                    found = found.where(~crowded)
            chosen = kernels.rank(found.lanes, len(self.heap)) < limit
            limit *= 4

    def measure(self, some: Candidates) -> Floats:
        """Return the candidates' squared distances, as sums of squares (m,)."""
        sums = np.zeros(len(some), np.float64)
        neighbours, theirs = np.divmod(some.places, self.a_neighbour)
        mine, upsampling = self.plan.lanes[some.lanes], self.plan.upsampling

        def add(rows: Ints) -> None:
            part = np.zeros(len(rows), np.float64)
            for number, level in enumerate(self.gallery if len(rows) else []):
                values, shift = load(level[neighbours[rows[0]]], self.origin.shifts[number])
                kernels.add_differences(
                    self.origin.native[number], values, shift,
                    *upsampling.under(number, mine[rows]), *upsampling.under(number, theirs[rows]), part,
                )  # fmt: skip
            sums[rows] = part

        order = np.argsort(neighbours, kind="stable")
        list(self.map(add, np.split(order, np.flatnonzero(np.diff(neighbours[order])) + 1)))
        with np.errstate(over="ignore"):
            return sums.astype(np.float32)
