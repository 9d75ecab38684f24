"""The kappa nearest neighbours of every query patch, each by its nearest patch: at most one match an image.

A defect that hides in one normal image excuses its like only there. Averaged over the nearest patches of several
images, a distance is small only where several images have something alike.

Products choose the patches. Half a squared distance without the query's own part is |x|^2 / 2 - <q, x>: the norms are a
channel of the product. Its error is bounded, and all patches that rounding could have hidden are measured. What is
chosen is measured as sums of squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import ROUNDING, Array
from ..errors import FeatureError
from ..system.threads import in_one_thread, torch_threads
from . import distinct_kernels as kernels
from .sharing import share_out
from .upsampling import as_tensor, shift_of

TILE_BYTES = 2**20  # products at a time

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def search_distinct(query: Array, gallery: Array, kappa: int) -> tuple[Floats, Ints]:
    """Search one level of all neighbours on the CPU, with torch's number of threads.

    Args:
        query: (c, m) patches.
        gallery: (K, c, h, w) level of the neighbours.
        kappa: number of neighbours, at most K.

    Returns:
        sq_distances (m, kappa), ascending, and matches (m, kappa): positions counted through neighbour, row, column.
        Equal distances are in the order of positions.

    Raises:
        FeatureError: a squared distance does not fit float32.
    """
    search = in_one_thread(_Search.of, query, gallery)
    k, threads = len(gallery), min(torch_threads(), len(gallery))
    pairs = query.shape[1] * gallery.shape[2] * gallery.shape[3]
    together = max(1, min(TILE_BYTES // (4 * pairs), -(-k // threads)))  # small neighbours share a product
    work = [range(first, min(first + together, k)) for first in range(0, k, together)]
    share_out(work, [_Worker(search, kappa) for _ in range(min(threads, len(work)))])
    with np.errstate(over="ignore", invalid="ignore"):
        best, at = search.nearest(kappa)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return best, at


@dataclass(frozen=True)
class _Search:
    """The query as an operand, and for each neighbour the nearest patch by its product (K, m)."""

    gallery: Array
    shift: torch.Tensor  # (c, 1), subtracted from both sides
    query: torch.Tensor  # (m, c) float32
    operand: torch.Tensor  # (m, c + 1) float32: the query's negative, and 1 for the norms
    norms: Floats  # (m,) of the query
    halves: Floats  # (K, m) least half squared distance without the query's own part
    doubts: Floats  # (K, m) that the product may be off by
    at: Ints  # (K, m) the nearest cell, or HOPELESS: kappa neighbours are nearer

    @classmethod
    def of(cls, query: Array, gallery: Array) -> _Search:
        """Prepare the (c, m) query."""
        shift = shift_of(query[:, None]).reshape(-1, 1)
        rows = (as_tensor(query) - shift).float().t().contiguous()
        operand = torch.cat([-rows, torch.ones(len(rows), 1)], dim=1)
        shape = len(gallery), len(rows)
        norms = torch.linalg.vector_norm(rows, dim=1).numpy()
        return cls(
            gallery, shift, rows, operand, norms, np.empty(shape, np.float32), np.empty(shape, np.float32),
            np.empty(shape, np.int64),
        )  # fmt: skip

    def cells(self, some: range) -> torch.Tensor:
        """Return the level of some neighbours as (n, c, h * w) float32, shifted."""
        level = as_tensor(self.gallery[some.start : some.stop])
        return (level.reshape(len(some), len(self.shift), -1) - self.shift).float()

    def nearest(self, kappa: int) -> tuple[Floats, Ints]:
        """Measure the neighbours that can be among the kappa nearest, and return those."""
        k, m = self.halves.shape
        highs = np.partition(self.halves + self.doubts, kappa - 1, axis=0)[kappa - 1]
        wanted = ~(self.halves - self.doubts > highs)  # what overflowed, too
        height, width = self.gallery.shape[2:]
        found, places = np.full((k, m), np.inf, np.float32), np.zeros((k, m), np.int64)
        for number in range(k):
            lanes = np.flatnonzero(wanted[number])
            if len(lanes):
                at, cells = self.at[number, lanes], self.cells(range(number, number + 1))[0].t().contiguous().numpy()
                sq_distances = np.empty(len(lanes), np.float64)
                kernels.measure(self.query.numpy(), cells, lanes, at, sq_distances)
                found[number, lanes] = sq_distances
                places[number, lanes] = number * height * width + at
        order = np.argsort(found, axis=0, kind="stable")[:kappa]  # stable: in the order of neighbours
        return np.take_along_axis(found, order, 0).T.copy(), np.take_along_axis(places, order, 0).T.copy()


class _Worker:
    """One thread's share of the neighbours."""

    def __init__(self, search: _Search, kappa: int) -> None:
        """Begin with the kappa least upper bounds of every query patch at infinity."""
        self.search = search
        self.highs = np.full((len(search.query), kappa), np.inf, np.float32)

    def run(self, work: Iterator[range]) -> None:
        """Find the nearest patch of each of some neighbours, by products that stay in a core's cache until used."""
        search, buffer, mine = self.search, None, self.search.query.numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances, and is refused there
            for some in work:
                cells = search.cells(some)
                sq_norms = cells.square().sum(dim=1, keepdim=True)
                theirs, patches = torch.cat([cells, sq_norms / 2], dim=1), cells.transpose(1, 2).contiguous().numpy()
                largest = sq_norms.amax(dim=2).sqrt().numpy()
                factor = np.float32(ROUNDING * cells.shape[1] ** 0.5 / 2)
                search.doubts[some] = factor * (search.norms + largest) ** 2
                step = max(1, TILE_BYTES // (4 * len(some) * cells.shape[2]))
                if buffer is None:
                    buffer = torch.empty(len(some), step, cells.shape[2])
                for start in range(0, len(mine), step):
                    rows = slice(start, min(start + step, len(mine)))
                    count = rows.stop - start
                    if len(some) == 1:
                        part = torch.mm(search.operand[rows], theirs[0], out=buffer[0, :count])[None]
                    else:
                        part = torch.matmul(search.operand[rows], theirs)
                    halves = part.amin(dim=2).numpy()
                    search.halves[some, rows] = halves
                    for number, products, own, least in zip(some, part.numpy(), patches, halves, strict=True):
                        kernels.least(
                            products, search.doubts[number, rows], mine[rows], own, self.highs[rows], least,
                            search.at[number, rows],
                        )  # fmt: skip
