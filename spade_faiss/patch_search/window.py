"""Patch search in a window: each patch of the query is compared with those near its own position only.

Nothing outside the window is computed. One neighbour at a time is loaded with its channels one after the other, so
that the patches at one offset lie beside each other and their differences are vectors (`window_kernels.add_squares`).
These sums are float32 and choose candidates: what comes within their rounding error of the kappa least is measured in
float64, so that no rounding hides a nearer patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import torch
from torch.nn import functional as F

from ..arrays import Array
from ..errors import FeatureError
from ..system.threads import in_one_thread, torch_threads
from . import window_kernels as kernels
from .cosine import fill_directions
from .pyramid_kernels import keep_nearest
from .pyramid_plan import Floats, Ints
from .settings import Radius
from .sharing import share_out
from .upsampling import as_tensor, shifts_of

BAND_CELLS = 512  # query patches compared at a time: their channels and sums stay in a core's cache
BAND_SUMS = 2**17  # as many, if there are many offsets


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
    k = len(gallery[0])
    workers = [_Worker(loader, own, gallery, kappa) for _ in range(min(torch_threads(), k))]
    share_out(range(k), workers)
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

    def empty(self) -> Floats:
        """Return zeros for the patches of an image, (channels, cells with padding around them)."""
        # Where channels lie 4096 bytes apart, a cache has room for few of them: twice the seconds.
        across = -(-self.cells // 16) * 16 + 2 * self.pad
        return np.zeros((self.channels, across + max(0, 80 - across % 256)), np.float32)

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


class _Worker:
    """One thread's share of the search: compares neighbours in their order and keeps the nearest patches."""

    def __init__(self, loader: _Loader, own: Floats, gallery: list[Array], kappa: int) -> None:
        self.loader, self.own, self.gallery = loader, own, gallery
        height, width = loader.grid
        rows, columns = loader.radius
        offsets = product(range(-rows, rows + 1), range(-columns, columns + 1))
        self.offsets = np.array(list(offsets), np.int64)  # (dy, dx), ascending
        band = max(1, min(BAND_CELLS, BAND_SUMS // len(self.offsets)) // width)
        self.edges = [*range(0, height, band), height]
        # Each sum of squares is rounded once for every CHANNELS of them, and a few times before.
        self.slack = np.float32(4 * (loader.channels / kernels.CHANNELS + 8) * 2.0**-24)
        self.level = loader.empty()
        self.sums = np.empty((len(self.offsets), min(band, height) * width), np.float32)
        self.lanes, self.places = np.empty(self.sums.size, np.int64), np.empty(self.sums.size, np.int64)
        shape = loader.cells, kappa
        self.heap = np.full(shape, np.inf, np.float32)  # the kappa least sums
        self.best, self.best_at = np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int64)

    def run(self, work: Iterator[int]) -> None:
        """Compare neighbours, ascending, until there are no more."""
        with np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances, and is refused there
            for neighbour in work:
                self.loader.load([level[neighbour] for level in self.gallery], self.level)
                for band in pairwise(self.edges):
                    self.compare(neighbour * self.loader.cells, band)

    def compare(self, place: int, band: tuple[int, int]) -> None:
        """Compare a band of the query's rows with the loaded neighbour, whose first patch is at `place`."""
        loader = self.loader
        kernels.add_squares(self.own, self.level, loader.pad, loader.grid, loader.radius, band, self.sums)
        count = kernels.choose(
            self.sums, loader.grid, self.offsets, band, place, (self.heap, self.best), self.slack,
            self.lanes, self.places,
        )  # fmt: skip
        if count:
            lanes, places, sums = self.lanes[:count], self.places[:count], np.empty(count, np.float64)
            kernels.measure(self.own, self.level, loader.pad, lanes, places - place, sums)
            keep_nearest(lanes, places, sums.astype(np.float32), self.best, self.best_at)
