"""Patch search through a temporary flat FAISS index over the neighbours' patches alone."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from ..arrays import ROUNDING, Array
from ..errors import FeatureError
from ..system.devices import gpu_lock, gpu_number, gpu_resources
from .upsampling import fill_patches, shift_of

SPARE = 2  # candidates beyond kappa: usually enough to show that rounding in FAISS has hidden nothing

Best = tuple[NDArray[np.float32], NDArray[np.int64]]  # (q, kappa) squared distances and positions


def search_flat(
    query: list[Array], gallery: list[Array], kappa: int, device: str, block_bytes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search block by block of neighbours; see search_patches.

    Returns:
        sq_distances (h * w, kappa) and matches (h * w, kappa): positions counted through neighbour, row, column.
    """
    shifts = [shift_of(level) for level in query]
    (height, width), d = query[0].shape[1:], sum(len(level) for level in query)
    xq = np.empty((height * width, d), np.float32)
    fill_patches(xq, query, shifts)

    k, a_neighbour = len(gallery[0]), height * width
    step = max(1, min(k, block_bytes // (a_neighbour * d * xq.itemsize)))
    block = np.empty((step * a_neighbour, d), np.float32)
    best: Best = np.full((len(xq), kappa), np.inf, np.float32), np.full((len(xq), kappa), -1, np.int64)
    for first in range(0, k, step):
        xb = block[: min(step, k - first) * a_neighbour]
        for number, neighbour in enumerate(range(first, min(first + step, k))):
            fill_patches(xb[number * a_neighbour :][:a_neighbour], [level[neighbour] for level in gallery], shifts)
        best = _search_block(_Block(xq, xb, first * a_neighbour), best, device)
    if not np.isfinite(best[0]).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return best


@dataclass(frozen=True)
class _Block:
    """All query patches, and the gallery patches of some neighbours."""

    xq: NDArray[np.float32]  # (q, d)
    xb: NDArray[np.float32]  # (m, d)
    offset: int  # position of the block's first patch


def _search_block(block: _Block, before: Best, device: str) -> Best:
    """Return the best of a block and of the blocks before it."""
    kappa, m = before[0].shape[1], len(block.xb)
    approximate, candidates = _nearest(block.xq, block.xb, min(m, kappa + SPARE), device)
    exact = _exact(block.xq, block.xb, candidates)
    exact[candidates < 0] = np.inf  # FAISS has none for a patch whose square is no float32
    after = _merge(before, exact, candidates + block.offset)
    if m > kappa + SPARE:
        _settle(block, approximate[:, -1], before, after)
    return after


def _merge(best: Best, sq_distances: NDArray[np.float32], at: NDArray[np.int64]) -> Best:
    """Return the kappa best of both, ties in the order of positions; all arrays are (rows, n)."""
    both, both_at = np.concatenate([best[0], sq_distances], axis=1), np.concatenate([best[1], at], axis=1)
    order = np.lexsort((both_at, both), axis=1)[:, : best[0].shape[1]]
    return np.take_along_axis(both, order, 1), np.take_along_axis(both_at, order, 1)


def _settle(block: _Block, last: Array, before: Best, after: Best) -> None:
    """Search again, in `after`, the rows in which rounding could have kept a patch out of the candidates.

    FAISS computes |q|^2 + |x|^2 - 2 q x, which is off by up to `doubt`. A patch that is no candidate is at least as far
    as the last candidate minus that doubt. If this does not exceed the kappa-th best (near copies, exact copies), every
    patch within the doubt is computed as a sum of squares.

    Args:
        block: what was searched.
        last: (q,) FAISS's distance of the last candidate.
        before: the best of the blocks before this one.
        after: the same, with this block's candidates.
    """
    xq, xb = block.xq, block.xb
    q_norms, x_norms = np.einsum("ij,ij->i", xq, xq), np.einsum("ij,ij->i", xb, xb)
    doubt = ROUNDING * np.sqrt(xq.shape[1]) * (np.sqrt(q_norms) + np.sqrt(x_norms.max())) ** 2
    # An exact match in an earlier block wins every tie.
    rows = np.flatnonzero((last - doubt <= after[0][:, -1]) & (before[0][:, -1] > 0))
    for some in np.array_split(rows, len(rows) // 64 + 1):
        approximate = q_norms[some, None] + x_norms - 2 * (xq[some] @ xb.T)
        for row, distances in zip(some, approximate, strict=True):
            one = slice(row, row + 1)
            near = np.flatnonzero(distances <= after[0][row, -1] + doubt[row])
            after[0][one], after[1][one] = _best_of(block, one, near, (before[0][one], before[1][one]))


def _best_of(block: _Block, one: slice, near: NDArray[np.int64], best: Best) -> Best:
    """Return the best of one row and its patches `near`, in the order of positions."""
    # kappa exact matches cannot be beaten by what comes after them.
    kappa, start = best[0].shape[1], 0
    step = 4 * kappa
    while start < len(near) and best[0][0, -1] > 0:
        part = near[start : start + step]
        best = _merge(best, _exact(block.xq[one], block.xb, part[None]), part[None] + block.offset)
        start, step = start + step, min(4 * step, 4096)
    return best


def _nearest(xq: Array, xb: Array, k: int, device: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k nearest of xb by FAISS: squared distances and ids, (q, k)."""
    if device == "cpu":
        # IndexFlatL2.search calls the same, but the block would be copied into an index first.
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = faiss.knn(xq, xb, k)
        return found
    config = faiss.GpuIndexFlatConfig()
    config.device = gpu_number(device)
    with gpu_lock:
        index = faiss.GpuIndexFlatL2(gpu_resources(), xq.shape[1], config)
        index.add(xb)
        found = index.search(xq, k)
    return found


def _exact(xq: Array, xb: Array, candidates: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return squared distances as sums of squares, (q, k): exact for small ones, 0 for equal patches."""
    distances = np.empty(candidates.shape, np.float32)
    if len(xq) == 1:
        difference = xb[candidates[0]] - xq
        np.einsum("ij,ij->i", difference, difference, out=distances[0])
        return distances
    for column in range(candidates.shape[1]):
        difference = xb[candidates[:, column]]
        difference -= xq
        np.einsum("ij,ij->i", difference, difference, out=distances[:, column])
    return distances
