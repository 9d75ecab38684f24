"""Patch search through a temporary flat FAISS index over only the neighbours' patches."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from ..arrays import ROUNDING, Array
from ..errors import FeatureError
from ..system.devices import gpu_lock, gpu_number, gpu_resources
from .upsampling import fill_patches, shift_of

SPARE = 2  # candidates beyond kappa: usually enough to see that rounding in FAISS has hidden nothing

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
    best = np.full((len(xq), kappa), np.inf, np.float32)
    best_at = np.full((len(xq), kappa), -1, np.int64)
    for first in range(0, k, step):
        xb = block[: min(step, k - first) * a_neighbour]
        for number, neighbour in enumerate(range(first, min(first + step, k))):
            fill_patches(xb[number * a_neighbour :][:a_neighbour], [level[neighbour] for level in gallery], shifts)
        approximate, candidates = _nearest(xq, xb, min(len(xb), kappa + SPARE), device)
        before = best, best_at
        best, best_at = _merge(before, _exact(xq, xb, candidates), candidates + first * a_neighbour)
        if len(xb) > kappa + SPARE:
            _settle(xq, xb, approximate[:, -1], before, (best, best_at), first * a_neighbour)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return best, best_at


def _merge(best: Best, sq_distances: NDArray[np.float32], at: NDArray[np.int64]) -> Best:
    """Return the kappa best of both, ties in the order of positions; all (rows, ...)."""
    both, both_at = np.concatenate([best[0], sq_distances], axis=1), np.concatenate([best[1], at], axis=1)
    order = np.lexsort((both_at, both), axis=1)[:, : best[0].shape[1]]
    return np.take_along_axis(both, order, 1), np.take_along_axis(both_at, order, 1)


def _settle(xq: Array, xb: Array, last: Array, before: Best, after: Best, offset: int) -> None:
    """Search again, in `after`, the rows in which rounding could have kept a patch out of the candidates.

    FAISS computes |q|^2 + |x|^2 - 2 q x, which is off by up to `doubt`. A patch that is no candidate is no nearer than
    the last candidate less that; where this does not exceed the kappa-th best (near copies, exact copies), every patch
    within the doubt is computed as a sum of squares.

    Args:
        xq: queries (q, d).
        xb: the block (m, d).
        last: (q,) FAISS's distance of the last candidate.
        before: the best of the blocks before this one.
        after: that, with this block's candidates.
        offset: position of the block's first patch.
    """
    kappa = after[0].shape[1]
    q_norms, x_norms = np.einsum("ij,ij->i", xq, xq), np.einsum("ij,ij->i", xb, xb)
    doubt = ROUNDING * np.sqrt(xq.shape[1]) * (np.sqrt(q_norms) + np.sqrt(x_norms.max())) ** 2
    # An exact match in an earlier block wins every tie.
    rows = np.flatnonzero((last - doubt <= after[0][:, -1]) & (before[0][:, -1] > 0))
    for some in np.array_split(rows, len(rows) // 64 + 1):
        approximate = q_norms[some, None] + x_norms - 2 * (xq[some] @ xb.T)
        for row, distances in zip(some, approximate, strict=True):
            one = slice(row, row + 1)
            found: Best = (before[0][one], before[1][one])
            near = np.flatnonzero(distances <= after[0][row, -1] + doubt[row])
            start, step = 0, 4 * kappa
            # In the order of positions: kappa exact matches cannot be beaten by what comes after them.
            while start < len(near) and found[0][0, -1] > 0:
                part = near[start : start + step]
                found = _merge(found, _exact(xq[one], xb, part[None]), part[None] + offset)
                start, step = start + step, min(4 * step, 4096)
            after[0][one], after[1][one] = found


def _nearest(xq: Array, xb: Array, k: int, device: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k nearest of xb by FAISS's flat index: distances and ids, (q, k)."""
    if device == "cpu":
        # What IndexFlatL2.search calls, without copying the block into an index first.
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
    """Return squared distances as sums of squares, (q, k): small ones do not drown in rounding, equal ones are 0."""
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
