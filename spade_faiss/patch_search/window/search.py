"""Patch search in a window: each patch of the query is compared with those near its own position only.

Nothing outside the window is computed. Neighbours are read with their channels one after the other, so that the patches
at one offset lie beside each other and their differences are vectors (`kernels.add_squares`). Where a level is
compared as it is stored, some channels are read at a time (`pieces`), else one neighbour is. These sums are
float32 and choose candidates: what comes within their rounding error of the kappa least is measured in float64, so that
no rounding hides a nearer patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import torch
from torch.nn import functional as F

from ...arrays import Array
from ...errors import FeatureError
from ...system.threads import in_one_thread, torch_threads
from ..bounds.sources import is_read_in_place, kind_of
from ..cosine import fill_directions
from ..heaps import keep_nearest
from ..pyramid.plan import Floats, Ints
from ..settings import Radius
from ..sharing import share_out
from ..upsampling import as_tensor, shifts_of
from . import kernels, pieces
from .simd import CHANNELS

BAND_CELLS = 512  # query patches compared at a time: their channels and sums stay in a core's cache
BAND_SUMS = 2**17  # as many, if there are many offsets
TOGETHER_SUMS = 2**16  # of neighbours that are compared together, piece by piece
PENDING = 2**17  # pairs that are noted before they are measured


def search_window(
    query: list[Array], gallery: list[Array], kappa: int, radius: Radius, is_cosine: bool
) -> tuple[Floats, Ints]:
    """Search all neighbours on the CPU with torch's number of threads; see search_patches.

    Args:
        query: levels [(c, h, w), ...], the finest first.
        gallery: levels [(K, c, h, w), ...].
        kappa: number of nearest patches, at most the number of candidates of any patch.
        radius: rows and columns on either side of a patch's own that are searched.
        is_cosine: whether to compare unit vectors; all levels are then of one grid.

    Returns:
        sq_distances (h * w, kappa) and matches (h * w, kappa): positions counted through neighbour, row, column.
    """
    radius = min(radius[0], query[0].shape[1] - 1), min(radius[1], query[0].shape[2] - 1)
    loader = in_one_thread(_Loader, query, gallery, radius, is_cosine)
    own = in_one_thread(loader.load, query)
    k, threads = len(gallery[0]), min(torch_threads(), len(gallery[0]))
    sums = loader.cells * (2 * radius[0] + 1) * (2 * radius[1] + 1)
    by_pieces = sums <= TOGETHER_SUMS and loader.reads_in_place(gallery)
    workers = [(_ByPieces if by_pieces else _ByNeighbours)(loader, own, gallery, kappa) for _ in range(threads)]
    together = max(1, min(TOGETHER_SUMS // sums, -(-k // threads))) if by_pieces else 1
    share_out([range(start, min(start + together, k)) for start in range(0, k, together)], workers)
    first, *others = workers
    for other in others:
        lanes, entries = np.nonzero(other.best_at >= 0)
        at = other.best_at[lanes, entries]
        keep_nearest(lanes, at, other.best[lanes, entries], first.best, first.best_at)
    order = np.lexsort((first.best_at, first.best), axis=1)
    best = np.take_along_axis(first.best, order, 1)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return best, np.take_along_axis(first.best_at, order, 1)


class _Loader:
    """Turns the levels of one image into patches, channels first: upsampled and shifted, or as unit vectors."""

    def __init__(self, query: list[Array], gallery: list[Array], radius: Radius, is_cosine: bool) -> None:
        self.grid: tuple[int, int] = query[0].shape[1:]
        self.cells, self.is_cosine = self.grid[0] * self.grid[1], is_cosine
        self.channels, self.radius = sum(map(len, query)) + is_cosine, radius
        self.pad = -(-radius[1] // 16) * 16  # columns that a window reaches before the first cell, and after the last
        self.shifts = [None] * len(query) if is_cosine else shifts_of(query, gallery)

    def reads_in_place(self, gallery: list[Array]) -> bool:
        """Return whether neighbours are compared as they are stored: of one level, neither shifted nor upsampled."""
        dtypes = {level.dtype for level in gallery}
        is_narrow = dtypes <= {np.dtype(np.float16), np.dtype(np.float32)}
        return len(gallery) == 1 and self.shifts == [None] and is_narrow and is_read_in_place(gallery)

    def empty(self, channels: int | None = None) -> Floats:
        """Return zeros for the patches of an image, (all channels or so many, cells with padding around them)."""
        # Where channels lie 4096 bytes apart, a cache has room for few of them: twice the seconds.
        across = -(-self.cells // 16) * 16 + 2 * self.pad
        return np.zeros((channels or self.channels, across + max(0, 80 - across % 256)), np.float32)

    def load(self, levels: list[Array], out: Floats | None = None) -> Floats:
        """Return the patches of levels [(c, h, w), ...] in `out`, or in new memory."""
        out = self.empty() if out is None else out
        if self.is_cosine:
            fill_directions(out, levels, self.pad)
            return out
        start = 0
        for level, shift in zip(levels, self.shifts, strict=True):
            values = as_tensor(level)
            if shift is not None:
                values = (values - shift).float()
            if values.shape[1:] != self.grid:
                values = F.interpolate(values[None], self.grid, mode="bilinear", align_corners=False)[0]
            target = torch.from_numpy(out[start : start + len(level), self.pad : self.pad + self.cells])
            target.copy_(values.reshape(len(level), -1))
            start += len(level)
        return out


class _Worker(ABC):
    """One thread's share of the search: compares neighbours in their order and keeps the nearest patches."""

    def __init__(self, loader: _Loader, own: Floats, gallery: list[Array], kappa: int) -> None:
        self.loader, self.own, self.gallery = loader, own, gallery
        rows, columns = loader.radius
        offsets = product(range(-rows, rows + 1), range(-columns, columns + 1))
        self.offsets = np.array(list(offsets), np.int64)  # (dy, dx), ascending
        # Each sum of squares is rounded once for every CHANNELS of them, and a few times before.
        self.slack = np.float32(4 * (loader.channels / CHANNELS + 8) * 2.0**-24)
        shape = loader.cells, kappa
        self.heap = np.full(shape, np.inf, np.float32)  # the kappa least sums
        self.best, self.best_at = np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int64)

    def run(self, work: Iterator[range]) -> None:
        """Compare neighbours, ascending, until there are no more."""
        with np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances, and is refused there
            for some in work:
                self.compare(some)

    @abstractmethod
    def compare(self, some: range) -> None:
        """Compare the query with some neighbours."""
        ...


class _ByNeighbours(_Worker):
    """Loads a neighbour, and compares the query with it band by band."""

    def __init__(self, loader: _Loader, own: Floats, gallery: list[Array], kappa: int) -> None:
        super().__init__(loader, own, gallery, kappa)
        height, width = loader.grid
        band = max(1, min(BAND_CELLS, BAND_SUMS // len(self.offsets)) // width)
        self.edges = [*range(0, height, band), height]
        self.level = loader.empty()
        self.sums = np.empty((len(self.offsets), min(band, height) * width), np.float32)
        self.lanes, self.places = np.empty(self.sums.size, np.int64), np.empty(self.sums.size, np.int64)

    def compare(self, some: range) -> None:
        """See _Worker."""
        for neighbour in some:
            self.loader.load([level[neighbour] for level in self.gallery], self.level)
            for band in pairwise(self.edges):
                self._compare(neighbour * self.loader.cells, band)

    def _compare(self, place: int, band: tuple[int, int]) -> None:
        """Compare a band of the query's rows with the loaded neighbour, whose first patch is at `place`."""
        loader = self.loader
        self.sums[:] = 0
        kernels.add_squares(self.own, self.level, loader.pad, loader.grid, loader.radius, band, self.sums)
        count = kernels.choose(
            self.sums, loader.grid, self.offsets, band, place, (self.heap, self.best), self.slack,
            self.lanes, self.places,
        )  # fmt: skip
        if count:
            lanes, places, sums = self.lanes[:count], self.places[:count], np.empty(count, np.float64)
            kernels.measure(self.own, self.level, loader.pad, lanes, places - place, sums)
            keep_nearest(lanes, places, sums.astype(np.float32), self.best, self.best_at)


class _ByPieces(_Worker):
    """Compares some channels of the query with those of several neighbours, as they are stored.

    What may be among the nearest is measured at the end, when most of it no longer may.
    """

    def __init__(self, loader: _Loader, own: Floats, gallery: list[Array], kappa: int) -> None:
        super().__init__(loader, own, gallery, kappa)
        [level] = gallery
        self.channels, self.kind = level.shape[1], kind_of({level.dtype})
        self.at = level.ctypes.data + np.arange(len(level)) * level.strides[0]
        self.factors = np.empty((len(level), loader.cells if loader.is_cosine else 0))
        self.piece, self.row = loader.empty(pieces.PIECE), np.empty(loader.cells, np.float32)
        room = max(PENDING, TOGETHER_SUMS)
        self.pending = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.float32)
        self.count = 0

    def run(self, work: Iterator[range]) -> None:
        """See _Worker."""
        super().run(work)
        with np.errstate(over="ignore", invalid="ignore"):
            self.measure()

    def compare(self, some: range) -> None:
        """See _Worker."""
        loader, at, factors = self.loader, self.at[some.start : some.stop], self.factors[some.start : some.stop]
        grid, sums = loader.grid, np.empty((len(some), len(self.offsets), loader.cells), np.float32)
        if loader.is_cosine:
            pieces.set_factors(self.kind, at, self.channels, self.row, factors)
        pieces.add_pieces(self.own, self.kind, at, loader.pad, grid, loader.radius, factors, self.piece, sums)
        if self.count + sums.size > len(self.pending[0]):
            self.measure()
        self.count = pieces.keep_sums(
            sums, grid, self.offsets, some.start, (self.heap, self.best), self.slack, self.pending, self.count
        )

    def measure(self) -> None:
        """Measure the pairs that were noted."""
        state = self.heap, self.best, self.best_at
        pieces.keep_pairs(
            self.own, self.kind, self.at, self.loader.pad, self.factors, state, self.slack, self.pending, self.count
        )
        self.count = 0
