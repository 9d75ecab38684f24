"""Exact squared distances, as sums of squares: of candidates, and of all images."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from .training import ImageFeatures

TOGETHER = 64  # queries whose candidates are in memory at a time: 25 MB for 75 candidates of 1280 dimensions


def compared(queries: Array, ids: Ids, usable: NDArray[np.bool_], features: ImageFeatures) -> Array:
    """Compute the squared distances between queries and the images found for them.

    Args:
        queries: (m, d) float32.
        ids: of the images found, (m, c).
        usable: which of them to compare, (m, c).
        features: of all images.

    Returns:
        (m, c) float32; infinity where not usable.
    """
    exact = np.full(ids.shape, np.inf, np.float32)
    for start in range(0, len(queries), TOGETHER):
        some = slice(start, start + TOGETHER)
        needed, at = np.unique(ids[some][usable[some]], return_inverse=True)
        places = np.full(ids[some].shape, -1, np.int64)
        places[usable[some]] = at
        exact[some] = _at_places(queries[some], features.read(needed), places)
    return exact


def _at_places(queries: Array, images: Array, places: Ids) -> Array:
    """Return the squared distances (m, c) between queries (m, d) and images (n, d) at places (m, c); -1: infinity."""
    (m, d), c = queries.shape, places.shape[1]
    out = np.empty((m, c), np.float32)
    pointers = [faiss.swig_ptr(array) for array in (out, queries, images, places)]
    faiss.fvec_L2sqr_by_idx(*pointers, d, m, c)
    return out


def nearest_of_all(
    queries: Array, k: int, without: Ids, removed: NDArray[np.bool_] | None, features: ImageFeatures
) -> tuple[Ids, NDArray[np.float32]]:
    """Find the k nearest images by comparing queries with every image.

    Args:
        queries: (m, d) float32.
        k: neighbours of each.
        without: ids that must not be returned.
        removed: whether each row is removed, (n,); None: no row is.
        features: of all n images.

    Returns:
        ids (m, k) and squared distances (m, k), ascending; ties in the order of ids.
    """
    usable = np.ones(len(features), np.bool_) if removed is None else ~removed
    usable[without] = False
    ids, start = np.empty((len(queries), 0), np.int64), 0
    sq_distances = np.empty((len(queries), 0), np.float32)
    for block in features.blocks():
        kept = np.flatnonzero(usable[start : start + len(block)])
        exact = [np.square(block[kept] - query).sum(axis=1) for query in queries]
        sq_distances = np.hstack([sq_distances, np.array(exact)])
        ids = np.hstack([ids, np.tile(kept + start, (len(queries), 1))])
        order = np.lexsort((ids, sq_distances), axis=1)[:, :k]
        ids, sq_distances = np.take_along_axis(ids, order, 1), np.take_along_axis(sq_distances, order, 1)
        start += len(block)
    return ids, sq_distances
