"""Exact search by bounds: a few directions rule most patches out, and what is left is measured.

Let P be m orthonormal directions. Then |q - x|^2 >= |Pq - Px|^2 + (|q - P'Pq| - |x - P'Px|)^2, a squared distance of
m + 1 numbers in place of all channels. If the directions hold most of the variance, few patches are left whose bound is
under the nearest found so far: these are measured as sums of squares. What rounding can do to a bound is counted into
it, so nothing is lost. Where directions do not pay, the bound is the product of all channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import FeatureError
from ..system.threads import in_one_thread, torch_threads
from . import bounds_kernels as kernels
from .bounds_plan import MULTIPLY, Projection, fitted
from .bounds_simd import LOOK, ROWS, WIDTH
from .pyramid_kernels import keep_nearest
from .sharing import share_out
from .upsampling import as_tensor, shift_of

CHUNK_BYTES = 2**19  # neighbours' patches loaded at a time
FIRST = 4  # neighbours searched by all channels; if matches are distinct, kappa more
WORTH = 3e7  # nanoseconds of products of all channels that are worth the choice of directions
CROWD = 0.05  # share of pairs that are measured beyond which directions are given up
SAMPLE, ASKED = 512, 64  # patches of the gallery that directions are fitted to; of the query that try them

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


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
    k, threads = len(gallery), torch_threads()
    with np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances, and is refused there
        search = in_one_thread(_Search.of, query, gallery, distinct)
        reach = np.full(len(search.query), np.inf, np.float32)
        workers = [_Worker(search, kappa, reach) for _ in range(min(threads, k))]
        together = max(1, min(CHUNK_BYTES // (4 * gallery[0].size), -(-k // threads)))  # small neighbours go together
        first = min(k, FIRST + kappa) if distinct else min(k, FIRST)
        share_out(_chunks(range(first), together), workers)
        if search.nanoseconds(k - first) > WORTH:  # now there is something that a patch must beat
            way = in_one_thread(search.directed, reach, first)
            for worker in workers:
                worker.way = way
        share_out(_chunks(range(first, k), together), workers)
    best, best_at = workers[0].best, workers[0].best_at
    for other in workers[1:]:
        lanes, entries = np.nonzero(other.best_at >= 0)
        keep_nearest(lanes, other.best_at[lanes, entries], other.best[lanes, entries], best, best_at)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    order = np.lexsort((best_at, best), axis=1)
    return np.take_along_axis(best, order, 1), np.take_along_axis(best_at, order, 1)


def _chunks(neighbours: range, together: int) -> list[range]:
    """Cut neighbours into what is loaded at a time."""
    return [neighbours[start : start + together] for start in range(0, len(neighbours), together)]


@dataclass(frozen=True)
class _Way:
    """How patches are multiplied: the projection of both sides, and the query by it."""

    projection: Projection
    operand: Floats  # (blocks, channels, ROWS)


@dataclass(frozen=True)
class _Search:
    """The query's side."""

    gallery: Array
    distinct: bool
    shift: torch.Tensor  # (c, 1), subtracted from both sides
    query: Floats  # (q, c), shifted
    scale: float  # a power of two that the products are taken at, so that squares neither overflow nor vanish
    centre: Floats  # (c,) mean of the gallery, shifted and at scale: bounds are tight about it
    own: torch.Tensor  # (c, q) the query about the centre, at scale
    sq_norms: NDArray[np.float64]  # (q,) of these
    plain: _Way  # by all channels

    @classmethod
    def of(cls, query: Array, gallery: Array, distinct: bool) -> _Search:
        """Prepare the (c, q) query."""
        shift = shift_of(query[:, None]).reshape(-1, 1)
        mine, sample = (as_tensor(query) - shift).float(), _sample(gallery, shift)
        scale = _scale(mine, sample)
        centre = (sample * scale).mean(dim=1, keepdim=True)
        own = mine * scale - centre
        sq_norms = own.double().square().sum(dim=0).numpy()
        plain = _Way(Projection(len(own), None), _blocks(own))
        return cls(
            gallery, distinct, shift, mine.T.contiguous().numpy(), scale, centre[:, 0].numpy(), own, sq_norms, plain
        )

    @property
    def cells(self) -> int:
        """Patches of a neighbour."""
        return int(self.gallery.shape[2] * self.gallery.shape[3])

    def nanoseconds(self, neighbours: int) -> float:
        """Estimate the nanoseconds of the products of all channels with some neighbours."""
        return float(neighbours * self.cells * len(self.query) * len(self.own) * MULTIPLY)

    def directed(self, reach: Floats, first: int) -> _Way:
        """Choose directions for the neighbours from `first` on, where all that counts is within reach (q,)."""
        sample = _sample(self.gallery[first:], self.shift) * self.scale - torch.from_numpy(self.centre)[:, None]
        some = slice(None, None, -(-len(self.query) // ASKED))
        within = torch.from_numpy(reach[some]) * self.scale**2
        projection = fitted(sample, self.own[:, some], within, len(self.query))
        sq_norms = torch.from_numpy(self.sq_norms.astype(np.float32))[None, None]
        return _Way(projection, _blocks(projection.of(self.own[None], sq_norms)[0]))

    def load(self, some: range) -> torch.Tensor:
        """Return the patches of some neighbours, (s, c, n) float32, shifted."""
        level = as_tensor(self.gallery[some.start : some.stop])
        level = level.reshape(len(some), len(self.shift), -1)
        if level.dtype != torch.float64:  # in place, and in the type of the product's: half the time
            return level.to(torch.float32, copy=True).sub_(self.shift)
        return (level - self.shift).float()


class _Worker:
    """One thread's share of the neighbours."""

    def __init__(self, search: _Search, kappa: int, reach: Floats) -> None:
        """Begin with nothing found; `reach` (q,) bounds the kappa-th nearest, and all workers lower it."""
        q, n = len(search.query), search.cells
        self.search, self.reach, self.way = search, reach, search.plain
        self.best, self.best_at = np.full((q, kappa), np.inf, np.float32), np.full((q, kappa), -1, np.int64)
        self.scratch = (
            np.full((ROWS, -(-n // LOOK) * LOOK), np.inf, np.float32), np.empty((ROWS, WIDTH), np.float32),
            np.empty(kappa, np.float32), np.empty(kappa, np.int64), np.empty(q, np.float64), np.empty(q, np.int64),
        )  # fmt: skip

    def run(self, work: Iterator[range]) -> None:
        """Compare neighbours, ascending, until there are no more."""
        with np.errstate(over="ignore", invalid="ignore"):
            for some in work:
                measured = self.compare(some)
                if measured > CROWD * len(some) * len(self.search.query) * self.search.cells:
                    self.way = self.search.plain  # more is left than the sample has shown

    def compare(self, some: range) -> int:
        """Compare some neighbours; returns the number of patches that were measured."""
        search, projection, n = self.search, self.way.projection, self.search.cells
        values = search.load(some)
        patches = np.empty((len(some), n, len(search.own)), np.float32)
        sq_norms, largest = np.empty((len(some), 1, n), np.float32), np.empty(len(some), np.float32)
        kernels.prepare(values.numpy(), np.float32(search.scale), search.centre, patches, sq_norms, largest)
        panels = np.empty((len(some), -(-n // WIDTH), projection.width + 1, WIDTH), np.float32)
        kernels.pack(projection.of(values, torch.from_numpy(sq_norms)).numpy(), sq_norms, largest, panels)
        count: int = kernels.compare(
            search.query, self.way.operand, search.sq_norms, patches, panels, largest, some.start * n,
            (search.scale**2, projection.doubt), search.distinct, self.best, self.best_at, self.reach, self.scratch,
        )  # fmt: skip
        return count


def _sample(gallery: Array, shift: torch.Tensor) -> torch.Tensor:
    """Return some patches from everywhere in the gallery, (c, s) float32, shifted."""
    k, channels = gallery.shape[:2]
    level = gallery.reshape(k, channels, -1)
    number = min(level.shape[2], -(-SAMPLE // k))
    cells = (np.arange(number) * level.shape[2] + level.shape[2] // 2) // number  # one of each of so many parts
    some = level[:: -(-k // SAMPLE), :, cells].transpose(1, 0, 2)
    return (as_tensor(some).reshape(channels, -1) - shift).float()


def _scale(*sides: torch.Tensor) -> float:
    """Return a power of two that brings patches (c, n) of any size near 1."""
    size = max(float(side.abs().amax()) for side in sides)
    return float(2.0 ** -np.clip(np.rint(np.log2(size)), -120, 120)) if 0 < size < np.inf else 1.0


def _blocks(operand: torch.Tensor) -> Floats:
    """Return (channels, q) as (blocks, channels, ROWS), the last block padded."""
    channels, q = operand.shape
    padded = np.zeros((channels, -(-q // ROWS) * ROWS), np.float32)
    padded[:, :q] = operand.numpy()
    return np.ascontiguousarray(padded.reshape(channels, -1, ROWS).transpose(1, 0, 2))
